//! The layers of the configuration: chooses the text of each setting, and collects the errors.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use super::value::{MASK, SettingValue};
use super::{Profile, Setting};
use crate::domain::counted::Counted;

/// Where the value of a setting came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueSource {
    /// The command line.
    Flag,
    /// The environment variable of this name.
    Environment(String),
    /// The TOML file at this path.
    File(PathBuf),
    /// The default in the table.
    Default,
    /// The default in the table that applies to `dev` only.
    DevDefault,
}

impl fmt::Display for ValueSource {
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

/// One error in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The setting as its source spells it, or a file.
    pub subject: String,
    /// Where it came from.
    pub origin: String,
    /// What is wrong: a sentence without subject and full stop.
    pub problem: String,
    /// A valid example.
    pub example: String,
}

/// All errors in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "invalid configuration: {}", Counted(self.0.len(), "error"))?;
        for error in &self.0 {
            writeln!(f, "\n  {} ({}): {}", error.subject, error.origin, error.problem)?;
            write!(f, "      example: {}", error.example)?;
        }
        write!(f, "\n\n`delivery serve --help` explains every setting")
    }
}

impl std::error::Error for ConfigErrors {}

/// The texts given for the settings, and the errors found so far.
///
/// A later layer overrides an earlier one: add the file first, then the environment, then the flags.
#[derive(Debug)]
pub struct Layers {
    profile: Profile,
    given: BTreeMap<&'static str, (String, ValueSource)>,
    /// The resolved settings, in the order of the table.
    resolved: Vec<(&'static Setting, ValueSource)>,
    pub(super) errors: Vec<ConfigError>,
}

impl Layers {
    /// Layers that contain the defaults only.
    pub fn new(profile: Profile) -> Self {
        Self { profile, given: BTreeMap::new(), resolved: Vec::new(), errors: Vec::new() }
    }

    /// Adds the command line.
    #[must_use]
    pub fn with_flags(mut self, flags: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        for (name, text) in flags {
            self.set(name, text, ValueSource::Flag);
        }
        self
    }

    /// Overrides what earlier layers gave for the setting.
    pub(super) fn set(&mut self, name: &'static str, text: String, source: ValueSource) {
        self.given.insert(name, (text, source));
    }

    /// Reads the value of the setting from the highest layer that has one. Settings are resolved in
    /// the order of the table. `None`: the text is invalid, and the error is recorded.
    pub(super) fn resolve<T: SettingValue>(&mut self, setting: &'static Setting) -> Option<T> {
        let (text, source) = match (self.given.remove(setting.name), setting.dev_default) {
            (Some(given), _) => given,
            (None, Some(default)) if self.profile == Profile::Dev => {
                (default.to_owned(), ValueSource::DevDefault)
            }
            (None, _) => (setting.default.to_owned(), ValueSource::Default),
        };
        self.resolved.push((setting, source));
        match setting.parse::<T>(text.trim()) {
            Ok(value) => Some(value),
            Err(problem) => {
                let shown = if T::SECRET { MASK } else { &text };
                self.reject(setting.name, format!("`{shown}` {problem}"));
                None
            }
        }
    }

    /// Records an error of a resolved setting.
    pub(super) fn reject(&mut self, name: &str, problem: impl Into<String>) {
        let mut resolved = self.resolved.iter();
        let (setting, source) =
            resolved.find(|(setting, _)| setting.name == name).expect("a resolved setting");
        let (subject, example) = match source {
            ValueSource::Flag => {
                let flag = setting.flag();
                (format!("--{flag}"), format!("--{flag} {}", setting.example))
            }
            ValueSource::Environment(name) => (name.clone(), format!("{name}={}", setting.example)),
            ValueSource::File(_) => (name.to_owned(), setting.toml_line(setting.example)),
            ValueSource::Default | ValueSource::DevDefault => {
                (setting.env(), format!("{}={}", setting.env(), setting.example))
            }
        };
        let origin = source.to_string();
        self.errors.push(ConfigError { subject, origin, problem: problem.into(), example });
    }

    /// The profile whose defaults apply.
    pub(super) fn profile(&self) -> Profile {
        self.profile
    }

    /// The source of each setting, in the order of the table, and the errors.
    pub(super) fn finish(self) -> (Vec<ValueSource>, Vec<ConfigError>) {
        (self.resolved.into_iter().map(|(_, source)| source).collect(), self.errors)
    }
}
