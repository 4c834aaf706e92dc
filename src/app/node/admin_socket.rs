//! The Unix socket of the admin API.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use crate::app::config::FileMode;

/// How long a process that has the file may take to accept a connection, before it counts as alive.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// The file of a socket, removed when dropped unless another process has replaced it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Listens on `path`. A file that a process has left there is replaced. `mode`: who may connect, which needs the right to
/// write (`unix(7)`).
///
/// # Errors
/// The path is in use, or no socket can be created there. The text names the setting.
pub(super) async fn listen(
    path: &Path,
    mode: FileMode,
) -> Result<(UnixListener, SocketFile), String> {
    refuse_other_use(path)
        .await
        .and_then(|()| create(path, mode).map_err(|error| cannot(&error)))
        .map_err(|why| format!("ADMIN_SOCKET: `{}` {why}", path.display()))
}

async fn refuse_other_use(path: &Path) -> Result<(), String> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(cannot(&error)),
        Ok(file) if !file.file_type().is_socket() => {
            return Err("is no socket: remove that file, or give another path".to_owned());
        }
        Ok(_) => {}
    }
    match timeout(ANSWER_MAX, UnixStream::connect(path)).await {
        // Nobody listens: it was left by a process that was killed.
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        // Removed meanwhile.
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err("belongs to another user: remove it, or give another path".to_owned())
        }
        _ => Err("is in use by another process: stop that one, or give another path".to_owned()),
    }
}

/// Creates the socket beside its place and moves it there, so that it never has another mode, and replaces what is left of
/// a former one.
fn create(path: &Path, FileMode(mode): FileMode) -> io::Result<(UnixListener, SocketFile)> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let _ = fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(mode))?;
    fs::rename(&beside, path)?;
    let file = identity(path)?;
    Ok((listener, SocketFile { path: path.to_owned(), file }))
}

fn cannot(error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => ": create its folder first (in systemd: RuntimeDirectory=)",
        io::ErrorKind::InvalidInput => ": at most 103 bytes are possible",
        _ => "",
    };
    format!("cannot be listened on: {error}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn socket_belongs_to_its_user_and_goes_with_its_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let (listener, file) = listen(&path, FileMode(0o600)).await.unwrap();
        assert_eq!(mode(&path), 0o600);
        let (client, server) = tokio::join!(UnixStream::connect(&path), listener.accept());
        assert!(client.is_ok() && server.is_ok());
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let _open = listen(&path, FileMode(0o660)).await.unwrap();
        assert_eq!(mode(&path), 0o660);
    }

    #[tokio::test]
    async fn file_that_was_left_is_replaced_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, file) = listen(&path, FileMode(0o600)).await.unwrap();
        assert_eq!(mode(&path), 0o600);
        let error = listen(&path, FileMode(0o600)).await.unwrap_err();
        assert!(error.contains("ADMIN_SOCKET") && error.contains("is in use"), "{error}");
        // Another process has taken the place: its file stays.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(file);
        let error = listen(&path, FileMode(0o600)).await.unwrap_err();
        assert!(error.contains("is no socket"), "{error}");
    }

    #[tokio::test]
    async fn error_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error =
            listen(&folder.path().join("none/admin.sock"), FileMode(0o600)).await.unwrap_err();
        assert!(error.contains("create its folder"), "{error}");
        let error =
            listen(&folder.path().join("x".repeat(120)), FileMode(0o600)).await.unwrap_err();
        assert!(error.contains("103 bytes"), "{error}");
    }
}
