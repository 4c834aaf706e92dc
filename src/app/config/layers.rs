//! The layers of the configuration and their faults.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use super::value::{MASK, Toml, Value};
use super::{Profile, Setting, TABLE, read_text};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The command line.
    Flag,
    /// The environment, and the variable's name.
    Environment(String),
    /// The TOML file.
    File(PathBuf),
    /// The table.
    Default,
    /// The table, where `dev` has a default of its own.
    DevDefault,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("command line"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Default => f.write_str("default"),
            Self::DevDefault => f.write_str("default of dev"),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What it is about: the setting as its source spells it, or a file.
    pub subject: String,
    /// Where it came from.
    pub origin: String,
    /// What is wrong, as a sentence without its full stop.
    pub problem: String,
    /// What would be right.
    pub example: String,
}

/// Everything that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0.len() == 1 { "" } else { "s" };
        writeln!(f, "the configuration is not valid: {} fault{plural}", self.0.len())?;
        for fault in &self.0 {
            writeln!(f, "\n  {} ({}): {}", fault.subject, fault.origin, fault.problem)?;
            write!(f, "      example: {}", fault.example)?;
        }
        write!(f, "\n\n`delivery serve --help` explains every setting")
    }
}

impl std::error::Error for Faults {}

/// What each layer says, as text, and the faults found so far.
#[derive(Debug)]
pub struct Layers {
    profile: Profile,
    flags: BTreeMap<&'static str, String>,
    environment: BTreeMap<&'static str, (String, String)>,
    file: BTreeMap<&'static str, String>,
    file_path: PathBuf,
    sources: Vec<Source>,
    faults: Vec<Fault>,
}

impl Layers {
    /// Only the defaults.
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            flags: BTreeMap::new(),
            environment: BTreeMap::new(),
            file: BTreeMap::new(),
            file_path: PathBuf::new(),
            sources: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Adds the command line.
    #[must_use]
    pub fn with_flags(mut self, flags: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        self.flags.extend(flags);
        self
    }

    /// Adds the environment. An empty variable is as good as none: deployments set them so.
    #[must_use]
    pub fn with_environment(mut self, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        for setting in TABLE {
            // The customary name of the Rust world goes before ours.
            let rust_log = (setting.name == "log_level").then(|| "RUST_LOG".to_owned());
            for name in rust_log.into_iter().chain([setting.env()]) {
                match variable(&name).map(OsString::into_string) {
                    None => continue,
                    Some(Ok(text)) if text.is_empty() => continue,
                    Some(Ok(text)) => drop(self.environment.insert(setting.name, (name, text))),
                    Some(Err(_)) => self.faults.push(Fault {
                        example: format!("{name}={}", setting.example),
                        subject: name,
                        origin: "environment".to_owned(),
                        problem: "is not UTF-8".to_owned(),
                    }),
                }
                break;
            }
        }
        self
    }

    /// Adds the TOML file.
    #[must_use]
    pub fn with_file(mut self, path: &Path) -> Self {
        path.clone_into(&mut self.file_path);
        match std::fs::read_to_string(path) {
            Ok(text) => self.read_file(&text),
            Err(error) => self.file_fault(
                path.display().to_string(),
                format!("cannot be read: {error}"),
                "--config /etc/delivery/delivery.toml".to_owned(),
            ),
        }
        self
    }

    fn file_fault(&mut self, subject: String, problem: String, example: String) {
        let origin = format!("file {}", self.file_path.display());
        self.faults.push(Fault { subject, origin, problem, example });
    }

    fn read_file(&mut self, text: &str) {
        let table = match text.parse::<toml::Table>() {
            Ok(table) => table,
            Err(error) => {
                let message = error.message().to_owned();
                let line =
                    error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
                return self.file_fault(
                    format!("line {line}"),
                    format!("is not TOML: {message}"),
                    "http_port = \"8083\"".to_owned(),
                );
            }
        };
        for (key, value) in table {
            let Some(setting) = TABLE.iter().find(|setting| setting.name == key) else {
                let nearest = nearest(&key);
                self.file_fault(
                    key,
                    format!("is not a setting; did you mean `{}`?", nearest.name),
                    toml_line(nearest, nearest.example),
                );
                continue;
            };
            match toml_text(&value) {
                Some(text) => drop(self.file.insert(setting.name, text)),
                None => self.file_fault(
                    key,
                    format!("is a TOML {}, which no setting is", value.type_str()),
                    toml_line(setting, setting.example),
                ),
            }
        }
    }

    fn find(&self, setting: &Setting) -> (String, Source) {
        if let Some(text) = self.flags.get(setting.name) {
            return (text.clone(), Source::Flag);
        }
        if let Some((name, text)) = self.environment.get(setting.name) {
            return (text.clone(), Source::Environment(name.clone()));
        }
        if let Some(text) = self.file.get(setting.name) {
            return (text.clone(), Source::File(self.file_path.clone()));
        }
        match (self.profile, setting.dev_default) {
            (Profile::Dev, Some(default)) => (default.to_owned(), Source::DevDefault),
            (Profile::Dev | Profile::Serve, _) => (setting.default.to_owned(), Source::Default),
        }
    }

    /// The value of the setting from the highest layer that has one. Called once for each setting,
    /// in the order of the table.
    pub(super) fn resolve<T: Value>(&mut self, name: &str) -> Option<T> {
        let setting = &TABLE[self.sources.len()];
        assert_eq!(setting.name, name, "settings are resolved in the order of the table");
        let (text, source) = self.find(setting);
        self.sources.push(source);
        match read_text::<T>(setting, text.trim()) {
            Ok(value) => Some(value),
            Err(problem) => {
                let shown = if T::SECRET { MASK } else { &text };
                self.fault(name, format!("`{shown}` {problem}"));
                None
            }
        }
    }

    /// Reports a fault of a setting whose source is known.
    pub(super) fn fault(&mut self, name: &str, problem: String) {
        let index = TABLE.iter().position(|setting| setting.name == name).expect("a setting");
        let (setting, source) = (&TABLE[index], &self.sources[index]);
        let (subject, example) = match source {
            Source::Flag => {
                let flag = setting.flag();
                (format!("--{flag}"), format!("--{flag} {}", setting.example))
            }
            Source::Environment(name) => (name.clone(), format!("{name}={}", setting.example)),
            Source::File(_) => (name.to_owned(), toml_line(setting, setting.example)),
            Source::Default | Source::DevDefault => {
                (setting.env(), format!("{}={}", setting.env(), setting.example))
            }
        };
        self.faults.push(Fault { subject, origin: source.to_string(), problem, example });
    }

    /// The profile whose defaults apply.
    pub(super) fn profile(&self) -> Profile {
        self.profile
    }

    pub(super) fn finish(self) -> (Vec<Source>, Vec<Fault>) {
        (self.sources, self.faults)
    }
}

/// A line of a TOML file that sets the value.
pub(super) fn toml_line(setting: &Setting, text: &str) -> String {
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let bare = text.bytes().all(|b| b.is_ascii_alphanumeric()) && text.parse::<i64>().is_ok()
        || matches!(text, "true" | "false");
    let value = match setting.toml {
        Toml::Bare if bare => text.to_owned(),
        Toml::Bare | Toml::Text => quoted(text),
        Toml::List => {
            let items: Vec<_> =
                text.split(',').filter(|item| !item.is_empty()).map(quoted).collect();
            format!("[{}]", items.join(", "))
        }
    };
    format!("{} = {value}", setting.name)
}

/// The text of a TOML value, as the other layers would write it.
fn toml_text(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(items) => {
            let texts: Option<Vec<_>> = items.iter().map(toml_text).collect();
            texts.map(|texts| texts.join(","))
        }
        toml::Value::Float(_) | toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}

/// The setting whose name takes the fewest edits.
fn nearest(key: &str) -> &'static Setting {
    let key = key.to_ascii_lowercase().replace('-', "_");
    TABLE.iter().min_by_key(|setting| edits(&key, setting.name)).expect("the table is not empty")
}

/// Levenshtein distance in bytes.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::{ListenAddress, Settings, load};
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn environment(pairs: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
        |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
    }

    fn faults(layers: Layers) -> Vec<Fault> {
        load(layers).unwrap_err().0
    }

    fn settings(layers: Layers) -> Settings {
        load(layers).unwrap().settings
    }

    #[test]
    fn higher_layer_wins() {
        let file =
            file("kafka_brokers = [\"file:1\"]\nshards = 1\nrouters = 2\nauth_mode = 'trust'");
        let variables =
            environment(&[("SHARDS", "2"), ("KAFKA_BROKERS", "env:1"), ("ROUTERS", "")]);
        let loaded = load(
            Layers::new(Profile::Serve)
                .with_file(file.path())
                .with_environment(variables)
                .with_flags([("shards", "3".to_owned())]),
        )
        .unwrap();
        let shown = loaded.settings.show();
        let get = |name| {
            let index = TABLE.iter().position(|setting| setting.name == name).unwrap();
            (shown[index].as_str(), loaded.sources[index].clone())
        };
        assert_eq!(get("shards"), ("3", Source::Flag));
        assert_eq!(get("kafka_brokers"), ("env:1", Source::Environment("KAFKA_BROKERS".into())));
        assert_eq!(get("routers"), ("2", Source::File(file.path().into())));
        assert_eq!(get("ping_interval"), ("54s", Source::Default));
    }

    #[test]
    fn every_fault_is_told_at_once_with_its_source_and_an_example() {
        let file = file("ruoters = 1\nhttp_addr = 'x'\ndeflate = 1.5");
        let faults = faults(
            Layers::new(Profile::Dev)
                .with_file(file.path())
                .with_environment(environment(&[("PING_INTERVAL", "54")]))
                .with_flags([
                    ("shards", "many".to_owned()),
                    ("queue_messages_max", "0".to_owned()),
                ]),
        );
        let told: Vec<_> =
            faults.iter().map(|f| (f.subject.as_str(), f.example.as_str())).collect();
        assert_eq!(
            told,
            [
                ("deflate", "deflate = true"),
                ("ruoters", "routers = 1"),
                ("http_addr", "http_addr = \":8093\""),
                ("--shards", "--shards 6"),
                ("--queue-messages-max", "--queue-messages-max 128"),
                ("PING_INTERVAL", "PING_INTERVAL=54s"),
            ]
        );
        let text = Faults(faults).to_string();
        assert!(text.contains("6 faults"), "{text}");
        assert!(text.contains("--shards (command line): `many` is not a whole number, nor `auto`"));
        assert!(text.contains("`0` is not between 2 and 32766"), "{text}");
    }

    #[test]
    fn secret_is_not_told() {
        let file = file("jwt_secret = ['a']\njwt_key_file = ''\nredis_url = 'hunter2'");
        let faults = Faults(faults(Layers::new(Profile::Serve).with_file(file.path())));
        assert!(!faults.to_string().contains("hunter2"), "{faults}");
    }

    #[test]
    fn file_that_is_not_toml_names_the_line() {
        let file = file("shards = 1\nrouters = = 2\n");
        let faults = faults(Layers::new(Profile::Dev).with_file(file.path()));
        assert_eq!(faults[0].subject, "line 2");
    }

    #[test]
    fn contract_names_work() {
        let variables = environment(&[
            ("HTTP_PORT", ":9083"),
            ("HTTP_ADDR", ":9093"),
            ("KAFKA_BROKERS", "a:9092,b:9092"),
            ("KAFKA_TOPICS", "x,y"),
            ("REDIS_ADDR", "redis:6379"),
            ("INSTANCE_ID", ""),
            ("MSG_SVC_ADDR", "m:1"),
            ("CONV_SVC_ADDR", "c:1"),
            ("PRESENCE_SVC_ADDR", "p:1"),
            ("JWT_SECRET", "0123456789abcdef0123456789abcdef"),
            ("SERVICE_NAME", "push"),
            ("METRICS_ENABLED", "true"),
            ("TRACING_ENABLED", "false"),
        ]);
        let settings = settings(Layers::new(Profile::Serve).with_environment(variables));
        assert_eq!(settings.http_port, ListenAddress { ip: None, port: 9083 });
        assert_eq!(settings.kafka_brokers.len(), 2);
        assert_eq!(settings.service_name.as_str(), "push");
        assert!(settings.instance_id.is_none());
    }

    #[test]
    fn rust_log_wins_over_log_level() {
        let variables = environment(&[("LOG_LEVEL", "warn"), ("RUST_LOG", "debug")]);
        let settings = settings(Layers::new(Profile::Dev).with_environment(variables));
        assert_eq!(settings.log_level.as_str(), "debug");
    }
}
