//! The configuration as text: the effective values, and the reference.

use std::fmt::Write as _;

use super::layers::toml_line;
use super::value::MASK;
use super::{Loaded, TABLE};

/// The effective values as a TOML file: it can be given back with `--config`, once the secrets are
/// filled in. Each line says where its value came from.
pub fn effective(loaded: &Loaded) -> String {
    let mut out = String::new();
    let mut group = "";
    for ((setting, text), source) in TABLE.iter().zip(loaded.settings.show()).zip(&loaded.sources) {
        if group != setting.group {
            group = setting.group;
            writeln!(out, "{}# {group}", if out.is_empty() { "" } else { "\n" }).expect(STRING);
        }
        let line = toml_line(setting, &text);
        // A masked value must not be taken for a real one when the file is used.
        let off = if text.contains(MASK) { "# " } else { "" };
        writeln!(out, "{:<52} # {source}", format!("{off}{line}")).expect(STRING);
    }
    out
}

const STRING: &str = "writing to a string does not fail";

/// The configuration reference: `docs/configuration.md`.
pub fn reference() -> String {
    let mut out = String::from(REFERENCE_HEAD);
    let mut group = "";
    for setting in TABLE {
        if group != setting.group {
            group = setting.group;
            write!(out, "\n## {group}\n").expect(STRING);
        }
        let (name, env, flag) = (setting.name, setting.env(), setting.flag());
        write!(out, "\n### `{name}`\n\n{}\n\n", setting.description()).expect(STRING);
        writeln!(out, "- Set by: `{env}`, `--{flag}`, `{}`", toml_line(setting, setting.example))
            .expect(STRING);
        write!(out, "- Value: {}", setting.kind).expect(STRING);
        if let Some((min, max)) = setting.bounds {
            write!(out, ", from {min} to {max}").expect(STRING);
        }
        let shown = |text: &str| {
            if text.is_empty() { "not set".to_owned() } else { format!("`{text}`") }
        };
        write!(out, "\n- Default: {}", shown(setting.default)).expect(STRING);
        if let Some(dev) = setting.dev_default {
            write!(out, "; with `delivery dev`: {}", shown(dev)).expect(STRING);
        }
        out.push('\n');
    }
    out
}

const REFERENCE_HEAD: &str = "\
# Configuration reference

Written by `delivery config --reference` from the settings table; a test keeps it so.

A setting is a flag (`--some-name`), an environment variable (`SOME_NAME`) or a line of the TOML file
that `--config` names (`some_name = …`). A flag wins over the environment, the environment over the
file, the file over the default. An empty environment variable counts as not set. Unknown keys and wrong
values are refused at start, all at once. `delivery config` prints what is in force and where each value
came from.

- An address is `8083`, `:8083` or `host:port`.
- A time has a unit: `500ms`, `54s`, `5m`, `1h`. A size is in bytes or has one: `64KiB`, `1MiB`, `1GiB`.
- A list is separated by commas; in TOML it may be an array.
";

#[cfg(test)]
mod tests {
    use super::super::{Layers, Profile, load};
    use super::*;

    #[test]
    fn reference_in_docs_is_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
        let committed = std::fs::read_to_string(path).unwrap();
        assert!(
            committed == reference(),
            "run: cargo run -- config --reference > docs/configuration.md"
        );
    }

    #[test]
    fn effective_configuration_can_be_given_back() {
        let flags = [
            ("jwt_secret", "0123456789abcdef0123456789abcdef".to_owned()),
            ("redis_url", "redis://me:hunter2@redis:6379".to_owned()),
            ("shards", "3".to_owned()),
        ];
        let loaded = load(Layers::new(Profile::Dev).with_flags(flags)).unwrap();
        let text = effective(&loaded);
        assert!(!text.contains("hunter2") && !text.contains("0123456789abcdef"), "{text}");

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        let again = load(Layers::new(Profile::Dev).with_file(file.path())).unwrap();
        let differ: Vec<_> = (TABLE.iter().zip(loaded.settings.show()))
            .zip(again.settings.show())
            .filter(|((_, before), after)| before != after)
            .map(|((setting, _), _)| setting.name)
            .collect();
        assert_eq!(differ, ["redis_url", "jwt_secret"]);
    }
}
