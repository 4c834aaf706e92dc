//! Configuration, read in one place and checked as a whole. Flags override the environment, which
//! overrides the TOML file, which overrides the defaults. All errors are reported together.

mod check;
#[cfg(test)]
mod deployments;
mod layers;
mod own_keys;
mod print;
mod reading;
mod revocations;
mod table;
mod tls_files;
mod value;

pub use layers::{ConfigError, ConfigErrors, Layers, ValueSource};
pub use own_keys::{BadKey, admin_tokens, has_development_secret, own_keys};
pub use print::{effective, reference};
pub use revocations::revocations;
pub use table::{Settings, TABLE};
pub use tls_files::{TlsFiles, TlsPair, tls_files};
pub use value::{
    AuthMode, Auto, Count, FileMode, GrpcAddress, HandOffMode, LegacyNodesMode, ListenAddress,
    LogFormat, MASK, Name, PeerAddress, PresenceMode, RoutingMode, SecretUrl, SettingValue, Size,
    TomlForm,
};

/// The command whose defaults apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// `delivery serve`: for production.
    Serve,
    /// `delivery dev`: needs nothing else installed and listens on loopback only.
    Dev,
}

/// One row of the settings table.
#[derive(Debug)]
pub struct Setting {
    /// The TOML key. [`Setting::env`] and [`Setting::flag`] are derived from it.
    pub name: &'static str,
    /// Heading in `--help` and in the reference.
    pub group: &'static str,
    /// The description, line by line.
    pub doc: &'static [&'static str],
    /// The type of the value, for people.
    pub kind: &'static str,
    /// How the value is written in TOML.
    pub toml: TomlForm,
    /// Default of `serve`, as text.
    pub default: &'static str,
    /// Default of `dev`, if it differs.
    pub dev_default: Option<&'static str>,
    /// Least and greatest value, as text.
    pub bounds: Option<(&'static str, &'static str)>,
    /// A valid value.
    pub example: &'static str,
}

impl Setting {
    /// The environment variable.
    pub fn env(&self) -> String {
        self.name.to_ascii_uppercase()
    }

    /// The flag, without its dashes.
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// The description as one line.
    pub fn description(&self) -> String {
        self.doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    /// Reads a text as a `T` and checks it against the bounds.
    ///
    /// # Errors
    /// What is wrong, as the end of a sentence that begins with the text.
    fn parse<T: SettingValue>(&self, text: &str) -> Result<T, String> {
        let value = T::parse(text)?;
        if let (Some((min, max)), Some(magnitude)) = (self.bounds, value.magnitude()) {
            let bound = |text| T::parse(text).ok().and_then(|bound| bound.magnitude());
            if Some(magnitude) < bound(min) || Some(magnitude) > bound(max) {
                return Err(format!("is not between {min} and {max}"));
            }
        }
        Ok(value)
    }

    /// The line of a TOML file that sets the value.
    fn toml_line(&self, text: &str) -> String {
        let quoted = |text: &str| toml::Value::from(text).to_string();
        let bare = text.parse::<i64>().is_ok() || matches!(text, "true" | "false");
        let value = match self.toml {
            TomlForm::Bare if bare => text.to_owned(),
            TomlForm::Bare | TomlForm::Text => quoted(text),
            TomlForm::List => {
                let items = text.split(',').filter(|item| !item.is_empty()).map(quoted);
                format!("[{}]", items.collect::<Vec<_>>().join(", "))
            }
        };
        format!("{} = {value}", self.name)
    }
}

/// Reads and checks all settings.
///
/// # Errors
/// All errors found.
pub fn load(mut layers: Layers) -> Result<Loaded, ConfigErrors> {
    let settings = Settings::resolve(&mut layers);
    if let Some(settings) = &settings {
        check::cross_check(settings, &mut layers);
    }
    let (sources, errors) = layers.finish();
    match settings {
        Some(settings) if errors.is_empty() => Ok(Loaded { settings, sources }),
        _ => Err(ConfigErrors(errors)),
    }
}

/// The valid settings, and where each came from.
#[derive(Debug)]
pub struct Loaded {
    /// The values.
    pub settings: Settings,
    /// In the order of [`TABLE`].
    pub sources: Vec<ValueSource>,
}

/// The settings of `dev` with these flags.
#[cfg(test)]
pub(super) fn dev_settings(flags: &[(&'static str, &str)]) -> Settings {
    let flags = flags.iter().map(|(name, value)| (*name, (*value).to_owned()));
    load(Layers::new(Profile::Dev).with_flags(flags)).unwrap().settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_bound_and_example_in_the_table_is_valid() {
        for setting in TABLE {
            let mut texts = vec![setting.default, setting.example];
            texts.extend(setting.dev_default);
            if let Some((min, max)) = setting.bounds {
                texts.extend([min, max]);
            }
            for text in texts {
                let mut layers =
                    Layers::new(Profile::Dev).with_flags([(setting.name, text.into())]);
                Settings::resolve(&mut layers);
                assert_eq!(layers.finish().1, [], "{}", setting.name);
            }
            assert!(!setting.example.is_empty(), "{}", setting.name);
            assert!(setting.description().ends_with('.'), "{}", setting.name);
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = TABLE.iter().map(|setting| setting.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), TABLE.len());
    }
}
