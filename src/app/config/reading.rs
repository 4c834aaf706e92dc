//! Reads the environment and the TOML file into the layers.

use std::ffi::OsString;
use std::path::Path;

use super::Setting;
use super::layers::{ConfigError, Layers, ValueSource};
use super::table::TABLE;

impl Layers {
    /// Adds the environment. An empty variable counts as not set, because deployments often set
    /// variables to nothing.
    #[must_use]
    pub fn with_environment(mut self, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        for setting in TABLE {
            // `RUST_LOG` is the usual variable of Rust programs, so it overrides `LOG_LEVEL`.
            let rust_log = (setting.name == "log_level").then(|| "RUST_LOG".to_owned());
            for name in rust_log.into_iter().chain([setting.env()]) {
                match variable(&name).map(OsString::into_string) {
                    None => continue,
                    Some(Ok(text)) if text.is_empty() => continue,
                    Some(Ok(text)) => {
                        self.set(setting.name, text, ValueSource::Environment(name));
                    }
                    Some(Err(_)) => self.errors.push(ConfigError {
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
        let source = ValueSource::File(path.to_owned());
        let origin = source.to_string();
        let error = |subject, problem, example| ConfigError {
            subject,
            origin: origin.clone(),
            problem,
            example,
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(cause) => {
                let example = "--config /etc/delivery/delivery.toml".to_owned();
                let problem = format!("cannot be read: {cause}");
                self.errors.push(error(path.display().to_string(), problem, example));
                return self;
            }
        };
        let table = match text.parse::<toml::Table>() {
            Ok(table) => table,
            Err(cause) => {
                let before = cause.span().map_or("", |span| &text[..span.start]);
                let line = format!("line {}", 1 + before.matches('\n').count());
                let problem = format!("is not TOML: {}", cause.message());
                self.errors.push(error(line, problem, "http_port = \"8083\"".to_owned()));
                return self;
            }
        };
        for (key, value) in table {
            let Some(setting) = TABLE.iter().find(|setting| setting.name == key) else {
                let nearest = nearest(&key);
                let problem = format!("is not a setting; did you mean `{}`?", nearest.name);
                self.errors.push(error(key, problem, nearest.toml_line(nearest.example)));
                continue;
            };
            match toml_text(&value) {
                Some(text) => self.set(setting.name, text, source.clone()),
                None => {
                    let problem = format!("is a TOML {}, which no setting is", value.type_str());
                    self.errors.push(error(key, problem, setting.toml_line(setting.example)));
                }
            }
        }
        self
    }
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
    let edits = |setting: &&Setting| strsim::damerau_levenshtein(&key, setting.name);
    TABLE.iter().min_by_key(edits).expect("the table is not empty")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::{ConfigErrors, ListenAddress, Profile, SettingValue as _, Settings, load};
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn environment(pairs: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
        |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
    }

    fn errors(layers: Layers) -> Vec<ConfigError> {
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
        assert_eq!(get("shards"), ("3", ValueSource::Flag));
        assert_eq!(
            get("kafka_brokers"),
            ("env:1", ValueSource::Environment("KAFKA_BROKERS".into()))
        );
        assert_eq!(get("routers"), ("2", ValueSource::File(file.path().into())));
        assert_eq!(get("ping_interval"), ("54s", ValueSource::Default));
    }

    #[test]
    fn all_errors_are_reported_together_with_source_and_example() {
        let file = file("ruoters = 1\nhttp_addr = 'x'\ndeflate = 1.5");
        let errors = errors(
            Layers::new(Profile::Dev)
                .with_file(file.path())
                .with_environment(environment(&[("PING_INTERVAL", "54")]))
                .with_flags([
                    ("shards", "many".to_owned()),
                    ("queue_messages_max", "0".to_owned()),
                ]),
        );
        let reported: Vec<_> =
            errors.iter().map(|f| (f.subject.as_str(), f.example.as_str())).collect();
        assert_eq!(
            reported,
            [
                ("deflate", "deflate = true"),
                ("ruoters", "routers = 1"),
                ("http_addr", "http_addr = \":8093\""),
                ("--shards", "--shards 6"),
                ("--queue-messages-max", "--queue-messages-max 128"),
                ("PING_INTERVAL", "PING_INTERVAL=54s"),
            ]
        );
        let text = ConfigErrors(errors).to_string();
        assert!(text.contains("6 errors"), "{text}");
        assert!(text.contains("--shards (command line): `many` is not a whole number, nor `auto`"));
        assert!(text.contains("`0` is not between 2 and 32766"), "{text}");
    }

    #[test]
    fn secret_is_not_shown() {
        let file = file("jwt_secret = ['a']\njwt_key_file = ''\nredis_url = 'hunter2'");
        let errors = ConfigErrors(errors(Layers::new(Profile::Serve).with_file(file.path())));
        assert!(!errors.to_string().contains("hunter2"), "{errors}");
    }

    #[test]
    fn file_that_is_not_toml_names_the_line() {
        let file = file("shards = 1\nrouters = = 2\n");
        let errors = errors(Layers::new(Profile::Dev).with_file(file.path()));
        assert_eq!(errors[0].subject, "line 2");
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
        assert_eq!(settings.log_level.show(), "debug");
    }
}
