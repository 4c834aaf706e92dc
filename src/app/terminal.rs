//! What the commands print. A terminal, pipe or file that takes no more never ends the process with a panic, as
//! `println!` does.

use std::io::{self, Write as _};

/// Writes to the standard output. A pipe whose reader has ended, as in `delivery config | head`, is no
/// error.
///
/// # Errors
/// The output takes no more, such as a file on a full disk. The text says which output, and why.
pub(super) fn print(text: &str) -> Result<(), String> {
    written(io::stdout().write_all(text.as_bytes()))
}

/// Flushes the standard output after this result of writing to it.
///
/// # Errors
/// Those of [`print`].
pub(super) fn written(result: io::Result<()>) -> Result<(), String> {
    match result.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to the standard output: {error}"))
        }
        _ => Ok(()),
    }
}

/// Writes a line to the standard error. If that fails there is nobody left to tell.
pub(super) fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
