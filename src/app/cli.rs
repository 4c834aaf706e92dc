//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgMatches, Args as _, Command};

use super::config::{self, Layers, Loaded, Profile, Setting, SettingValue, TABLE};
use super::{dev, operate, publish, serve, sizing, tail, terminal};

const ABOUT: &str = "Pushes each RealChat event to every connected device of every member";

const LONG_ABOUT: &str = "\
Delivery holds the client connections of a RealChat back end. It reads events from Kafka and pushes each one \
over WebSocket or gRPC to every connected device of every member of its conversation.

To try it without installing anything else:

    delivery dev                                       # in one terminal
    delivery tail --user alice --device phone          # in another

To send a message yourself (`delivery dev` prints the address of the broker):

    delivery publish --brokers 127.0.0.1:PORT message --conversation demo --sender bob \"Hello\"";

const SERVE_ABOUT: &str = "\
Runs a node with production defaults.

Each setting below can also be given as an environment variable (--http-port is HTTP_PORT) or as a line of \
the TOML file named by --config (http_port = \"8083\"). A flag overrides the environment, the environment \
overrides the file. Required: --kafka-brokers, and --jwt-secret or another key (or --auth-mode trust).";

const DEV_ABOUT: &str = "\
Runs a node without installing anything else. Kafka is embedded and stores nothing, there is no Redis and no \
other service, anybody can connect as any user, and the node listens on this machine only. A demo \
conversation gets a message about once a second. All settings of `serve` can be set.";

const CONFIG_ABOUT: &str = "\
Prints the effective configuration as a TOML file, with the source of each value and masked secrets. Takes \
the same flags as `serve`. Exits with status 2 if the configuration is invalid.";

/// Exit status if the command line or the configuration is invalid.
pub const INVALID: u8 = 2;

/// Runs the command given by the arguments.
pub fn run() -> ExitCode {
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        // The help and the version.
        Err(text) if !text.use_stderr() => return exit_code(terminal::written(text.print())),
        Err(error) => error.exit(),
    };
    let (name, matches) = matches.subcommand().expect("a subcommand is required");
    match name {
        "serve" => with_settings(matches, Profile::Serve, serve::run),
        "dev" => with_settings(matches, Profile::Dev, dev::run),
        "config" if matches.get_flag("reference") => {
            exit_code(terminal::print(&config::reference()))
        }
        "config" => {
            let profile = if matches.get_flag("dev") { Profile::Dev } else { Profile::Serve };
            with_settings(matches, profile, |loaded| terminal::print(&config::effective(&loaded)))
        }
        "admin" => exit_code(operate::run(&parsed(matches))),
        "publish" => exit_code(publish::run(&parsed(matches))),
        "sizing" => exit_code(sizing::run(&parsed(matches))),
        "tail" => exit_code(tail::run(&parsed(matches))),
        other => unreachable!("`{other}` is not a subcommand of `command`"),
    }
}

fn parsed<T: clap::FromArgMatches>(matches: &ArgMatches) -> T {
    T::from_arg_matches(matches).unwrap_or_else(|error| error.exit())
}

fn with_settings(
    matches: &ArgMatches,
    profile: Profile,
    run: impl FnOnce(Loaded) -> Result<(), String>,
) -> ExitCode {
    match config::load(layers(matches, profile)) {
        Ok(loaded) => exit_code(run(loaded)),
        Err(errors) => {
            terminal::complain(&format!("delivery: {errors}"));
            ExitCode::from(INVALID)
        }
    }
}

fn exit_code(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            terminal::complain(&format!("delivery: {why}"));
            ExitCode::FAILURE
        }
    }
}

fn layers(matches: &ArgMatches, profile: Profile) -> Layers {
    let mut layers = Layers::new(profile);
    if let Some(path) = matches.get_one::<PathBuf>("config") {
        layers = layers.with_file(path);
    }
    layers.with_environment(|name| std::env::var_os(name)).with_flags(flags(matches))
}

fn flags(matches: &ArgMatches) -> Vec<(&'static str, String)> {
    let no_demo = matches!(matches.try_get_one::<bool>("no-demo"), Ok(Some(true)));
    let given = TABLE.iter().filter_map(|setting| {
        let text = matches.get_one::<String>(setting.name)?;
        Some((setting.name, text.clone()))
    });
    given.chain(no_demo.then(|| ("dev_demo", "false".to_owned()))).collect()
}

fn command() -> Command {
    let no_demo = Arg::new("no-demo")
        .long("no-demo")
        .help("Do not run the demo conversation")
        .action(clap::ArgAction::SetTrue);
    let reference = Arg::new("reference")
        .long("reference")
        .help("Print the reference of all settings in Markdown instead")
        .action(clap::ArgAction::SetTrue);
    let dev_defaults = Arg::new("dev")
        .long("dev")
        .help("Use the defaults of `dev` instead of those of `serve`")
        .action(clap::ArgAction::SetTrue);
    let config_command = Command::new("config").arg(reference).arg(dev_defaults);
    Command::new("delivery")
        .about(ABOUT)
        .long_about(LONG_ABOUT)
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(setting_flags(about(Command::new("dev").arg(no_demo), DEV_ABOUT)))
        .subcommand(setting_flags(about(Command::new("serve"), SERVE_ABOUT)))
        .subcommand(setting_flags(about(config_command, CONFIG_ABOUT)))
        .subcommand(about(operate::Operate::augment_args(Command::new("admin")), operate::ABOUT))
        .subcommand(about(publish::Publish::augment_args(Command::new("publish")), publish::ABOUT))
        .subcommand(about(
            sizing::SizingArguments::augment_args(Command::new("sizing")),
            sizing::ABOUT,
        ))
        .subcommand(about(tail::Tail::augment_args(Command::new("tail")), tail::ABOUT))
}

/// Sets the long help. Its first sentence is the short help.
fn about(command: Command, text: &'static str) -> Command {
    let first = text.split(['.', ':']).next().expect("split returns at least one piece");
    command.about(first).long_about(text)
}

fn setting_flags(command: Command) -> Command {
    let file = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help("TOML file with settings");
    TABLE.iter().fold(command.arg(file), |command, setting| command.arg(setting_flag(setting)))
}

fn setting_flag(setting: &'static Setting) -> Arg {
    let mut help = format!("{} [{}", setting.description(), setting.env());
    match (setting.default, setting.dev_default) {
        ("", None) => {}
        (default, None) => help.push_str(&format!(", default {default}")),
        (default, Some(dev)) => help.push_str(&format!(", default {default}, in dev {dev}")),
    }
    help.push(']');
    // Leaked because clap requires static names. This runs once per process.
    let arg = Arg::new(setting.name)
        .long(&*setting.flag().leak())
        .help(help)
        .help_heading(setting.group)
        .value_name("VALUE");
    // `--echo` is short for `--echo true`.
    if setting.kind == <bool as SettingValue>::KIND {
        return arg.num_args(0..=1).default_missing_value("true");
    }
    arg.allow_hyphen_values(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(arguments: &[&str]) -> Loaded {
        let matches = command().get_matches_from(arguments);
        let (_, matches) = matches.subcommand().unwrap();
        config::load(Layers::new(Profile::Dev).with_flags(flags(matches))).unwrap()
    }

    #[test]
    fn command_line_is_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn every_setting_is_a_flag_of_serve_dev_and_config() {
        for name in ["serve", "dev", "config"] {
            for setting in TABLE {
                let flag = format!("--{}", setting.flag());
                let matches =
                    command().get_matches_from(["delivery", name, &flag, setting.example]);
                let (_, matches) = matches.subcommand().unwrap();
                assert_eq!(matches.get_one::<String>(setting.name).unwrap(), setting.example);
            }
        }
    }

    #[test]
    fn boolean_flag_needs_no_value() {
        let loaded = loaded(&["delivery", "dev", "--echo", "--deflate", "false", "--no-demo"]);
        let settings = loaded.settings;
        assert!(settings.echo && !settings.deflate && !settings.dev_demo);
    }
}
