//! Secrets and certificates in files, which are read again while the node runs.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::app::config::BadKey;
use crate::domain::counters::SharedCounter;

/// How often the files are read to see whether they have changed. Kubernetes replaces the files of a secret without a
/// signal.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Reads secrets again when `asked` changes, and from time to time, until the node ends. Gives those that differ from
/// `current` to `replace`. What cannot be read or used changes nothing.
///
/// `what`: their name in the log, in the plural. The counters count replacements and failures.
pub(super) async fn follow<T: PartialEq + Send + 'static>(
    what: &str,
    mut current: T,
    mut asked: watch::Receiver<u64>,
    read: impl Fn() -> Result<T, BadKey> + Clone + Send + 'static,
    mut replace: impl FnMut(&T) -> Result<(), String>,
    (replacements, failures): (&SharedCounter, &SharedCounter),
) {
    let mut seen = Failures::default();
    loop {
        let is_asked = tokio::select! {
            () = sleep(LOOK_AGAIN) => false,
            changed = asked.changed() => match changed {
                Ok(()) => true,
                Err(_) => return,
            },
        };
        let Ok(read) = spawn_blocking(read.clone()).await else { return };
        let outcome = match read {
            Ok(new) if new == current => {
                if is_asked {
                    tracing::info!("the {what} have not changed");
                }
                Ok(())
            }
            Ok(new) => replace(&new).map(|()| {
                current = new;
                replacements.add(1);
                tracing::info!("the {what} were replaced");
            }),
            Err(why) => Err(why.to_string()),
        };
        if let Some(why) = seen.newly_found(outcome.err(), is_asked) {
            failures.add(1);
            tracing::error!("the {what} stay as they were: {why}");
        }
    }
}

/// Tells each failure once, and only if it is found twice: a certificate and its key are two files, and whoever replaces
/// them may have replaced the first one only. After a request it is told at once.
#[derive(Debug, Default)]
struct Failures {
    last: Option<String>,
    told: Option<String>,
}

impl Failures {
    /// `found`: the failure of this look, if any.
    fn newly_found(&mut self, found: Option<String>, is_asked: bool) -> Option<String> {
        let is_confirmed = self.last == found && self.told != found;
        self.last.clone_from(&found);
        if found.is_none() {
            self.told = None;
        }
        let tells = found.filter(|_| is_asked || is_confirmed)?;
        self.told = Some(tells.clone());
        Some(tells)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_is_told_once_when_it_is_found_twice_or_asked_for() {
        let mut failures = Failures::default();
        let mut tells = |found: Option<&str>, is_asked| {
            failures.newly_found(found.map(str::to_owned), is_asked).is_some()
        };
        assert!(!tells(None, true));
        assert!(!tells(Some("mismatch"), false), "the second file may be on its way");
        assert!(!tells(None, false));
        assert!(!tells(Some("mismatch"), false));
        assert!(tells(Some("mismatch"), false));
        assert!(!tells(Some("mismatch"), false));
        assert!(tells(Some("mismatch"), true));
        assert!(!tells(Some("gone"), false));
        assert!(tells(Some("gone"), false));
        assert!(!tells(None, false));
        assert!(!tells(Some("gone"), false));
        assert!(tells(Some("gone"), true));
        assert!(!tells(Some("gone"), false));
    }
}
