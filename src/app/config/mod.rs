//! Configuration: flags over environment over an optional TOML file over defaults, read in one
//! place and checked whole. Every fault is reported, all at once.

mod check;
#[cfg(test)]
mod deployments;
mod layers;
mod print;
mod table;
mod value;

pub use layers::{Fault, Faults, Layers, Source};
pub use print::{effective, reference};
pub use table::{Settings, TABLE};
pub use value::{
    AuthMode, Auto, Count, GrpcAddress, ListenAddress, LogFormat, MASK, Name, PeerAddress,
    PresenceMode, RoutingMode, SecretUrl, Size, Toml, Value,
};

/// Whose defaults apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// `delivery serve`: fit for production.
    Serve,
    /// `delivery dev`: nothing else installed, loopback only.
    Dev,
}

/// One row of the settings table.
#[derive(Debug)]
pub struct Setting {
    /// The TOML key; [`Setting::env`] and [`Setting::flag`] follow from it.
    pub name: &'static str,
    /// Heading in `--help` and in the reference.
    pub group: &'static str,
    /// What it does, line by line.
    pub doc: &'static [&'static str],
    /// What kind of value it takes.
    pub kind: &'static str,
    /// How the value is written in TOML.
    pub toml: Toml,
    /// Default of `serve`, as text.
    pub default: &'static str,
    /// Default of `dev`, where it is another.
    pub dev_default: Option<&'static str>,
    /// Least and greatest value, as text.
    pub bounds: Option<(&'static str, &'static str)>,
    /// A right value.
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
}

/// Reads a text as a `T` and checks it against the bounds of the setting.
fn read_text<T: Value>(setting: &Setting, text: &str) -> Result<T, String> {
    let value = T::parse(text)?;
    if let Some((min, max)) = setting.bounds {
        let bound = |text| T::parse(text).expect("the table's bounds are read by a test");
        if !value.within(&bound(min), &bound(max)) {
            return Err(format!("is not between {min} and {max}"));
        }
    }
    Ok(value)
}

/// Reads and checks everything.
///
/// # Errors
/// All faults.
pub fn load(mut layers: Layers) -> Result<Loaded, Faults> {
    let settings = Settings::resolve(&mut layers);
    if let Some(settings) = &settings {
        check::missing_pieces(settings, &mut layers);
    }
    let (sources, faults) = layers.finish();
    match settings {
        Some(settings) if faults.is_empty() => Ok(Loaded { settings, sources }),
        _ => Err(Faults(faults)),
    }
}

/// The settings, and where each came from.
#[derive(Debug)]
pub struct Loaded {
    /// The values.
    pub settings: Settings,
    /// In the order of [`TABLE`].
    pub sources: Vec<Source>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_of_the_table_is_read() {
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
