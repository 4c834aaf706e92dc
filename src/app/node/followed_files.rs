//! Secrets in files, which are read again while the node runs.

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
    let mut last_failure = None;
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
        let failure = outcome.err();
        if let Some(why) = &failure
            && (is_asked || last_failure.as_ref() != Some(why))
        {
            failures.add(1);
            tracing::error!("the {what} stay as they were: {why}");
        }
        last_failure = failure;
    }
}
