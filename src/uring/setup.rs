//! Setup of a ring, with errors that say what to do.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use io_uring::{IoUring, Probe};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::buffers::{BUFFER_GROUP, BUFFERS_MAX, BufferRing};
use super::operation::NEEDED;
use crate::domain::limits::CONNECTIONS_PER_SHARD_MAX;

/// Linux 6.1: deferred task work (`IORING_SETUP_DEFER_TASKRUN`) and all required operations.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// Files of the table besides the connections: the listener and the doorbell.
pub(super) const EXTRA_FILES: u32 = 2;
/// The kernel's bound of a completion queue.
const COMPLETIONS_MAX: u32 = 1 << 16;
const COMPLETIONS_MIN: u32 = 1 << 12;
/// Pauses between attempts to create a ring while memory is short, ms.
const MEMORY_PAUSES_MS: [u64; 6] = [10, 20, 50, 100, 300, 1_000];
/// The system calls of io_uring.
const SETUP: &str = "io_uring_setup";
const REGISTER: &str = "io_uring_register";
const ENTER: &str = "io_uring_enter";
const UNPRIVILEGED_SETTING: &str = "/proc/sys/kernel/io_uring_disabled";

/// Settings of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Maximum number of connections: files 0 to this, exclusive. At most `RLIMIT_NOFILE` - 2.
    pub connections: u32,
    /// Receive buffers of [`RECEIVE_BUFFER_BYTES`](crate::domain::limits::RECEIVE_BUFFER_BYTES)
    /// each: a power of two, at most 32,768.
    pub receive_buffers: u16,
    /// Maximum number of operations per submission; rounded up to a power of two. More than about
    /// 64 brings no gain.
    pub submissions: u32,
}

impl Default for RingConfig {
    /// 4,096 connections, 256 receive buffers (1 MiB, resident only where used), 256 submissions.
    fn default() -> Self {
        Self { connections: 4096, receive_buffers: 256, submissions: 256 }
    }
}

/// Why the ring cannot be set up. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The kernel is older than 6.1.
    #[error(
        "Linux {release} is too old: this program needs Linux {}.{} or newer for io_uring",
        KERNEL_MIN.0,
        KERNEL_MIN.1
    )]
    KernelTooOld {
        /// As `uname -r` prints it.
        release: String,
    },
    /// A system call of io_uring was refused with EPERM, or one of them does not exist although another does.
    #[error("{call} is not permitted ({errno}): {hint}")]
    Forbidden {
        /// The system call.
        call: &'static str,
        /// EPERM, EACCES or ENOSYS.
        errno: Errno,
        /// The probable cause.
        hint: String,
    },
    /// `io_uring_setup` does not exist (ENOSYS).
    #[error(
        "this kernel has no io_uring (ENOSYS): it was built without CONFIG_IO_URING, or a sandbox \
         (gVisor, an old seccomp profile) blocks it; use a kernel that has it, or allow \
         io_uring_setup, io_uring_enter and io_uring_register in the sandbox"
    )]
    Missing,
    /// An operation or feature is missing although the kernel version has it.
    #[error(
        "Linux {release} lacks {what}, although this version should have it: a sandbox may restrict io_uring"
    )]
    Incomplete {
        /// As `uname -r` prints it.
        release: String,
        /// The operation or feature.
        what: &'static str,
    },
    /// The fixed-file table exceeds the process's limit of open files.
    #[error(
        "a shard for {connections} connections needs a table of {files} files, but RLIMIT_NOFILE is {limit} \
         (EMFILE): raise it (`ulimit -n`, LimitNOFILE=, --ulimit nofile=), or use more shards with \
         fewer connections each"
    )]
    TooManyFiles {
        /// As configured.
        connections: u32,
        /// Size of the table.
        files: u32,
        /// The soft limit.
        limit: u64,
    },
    /// The kernel had no memory for the ring.
    #[error("no memory for a ring of {} KiB (ENOMEM)", bytes / 1024)]
    NoMemory {
        /// What the kernel allocates for the ring. Since Linux 6.14 it counts towards `RLIMIT_MEMLOCK` of the
        /// user, unless the process has `CAP_IPC_LOCK`.
        bytes: u64,
    },
    /// The configuration is invalid on any system.
    #[error("{0}")]
    Config(&'static str),
    /// Any other error of the system.
    #[error("cannot {what}: {source}")]
    System {
        /// The action that failed.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
    },
}

/// The parts of a ring, registered with each other.
pub(super) struct Parts {
    pub(super) ring: IoUring,
    pub(super) buffers: BufferRing,
}

/// Sets up a ring, its file table and its buffers for the calling thread only.
pub(super) fn set_up(config: &RingConfig) -> Result<Parts, SetupError> {
    check(config)?;
    let release = kernel_release();
    if kernel_version(&release).is_some_and(|version| version < KERNEL_MIN) {
        return Err(SetupError::KernelTooOld { release });
    }
    let ring = create(config)?;
    check_features(&ring, config, &release)?;
    register_files(&ring, config)?;
    let failed = |call, what| move |source| explain(config, call, what, source);
    let buffers = BufferRing::new(config.receive_buffers)
        .map_err(failed("mmap", "map the receive buffers"))?;
    // SAFETY:
    // - The address is page-aligned and begins `count` zeroed entries (`BufferRing::new`).
    // - It stays mapped until the ring is closed: `Ring` declares `ring` before `buffers`, and on
    //   an error here nothing was registered.
    unsafe {
        let submitter = ring.submitter();
        submitter
            .register_buf_ring_with_flags(buffers.ring_address(), buffers.count(), BUFFER_GROUP, 0)
            .map_err(failed(REGISTER, "register the receive buffers"))?;
    }
    buffers.publish_all();
    // Only to find out whether it may be called: it submits nothing and waits for nothing.
    ring.submit().map_err(failed(ENTER, "submit to an io_uring"))?;
    Ok(Parts { ring, buffers })
}

fn check(config: &RingConfig) -> Result<(), SetupError> {
    if config.connections == 0 || config.connections > CONNECTIONS_PER_SHARD_MAX {
        return Err(SetupError::Config("connections per shard must be 1 to 1,048,576"));
    }
    if !config.receive_buffers.is_power_of_two() || config.receive_buffers > BUFFERS_MAX {
        return Err(SetupError::Config(
            "receive buffers per shard must be a power of two up to 32,768",
        ));
    }
    if config.submissions == 0 || config.submissions > COMPLETIONS_MAX / 2 {
        return Err(SetupError::Config("submissions must be 1 to 32,768"));
    }
    Ok(())
}

/// Creates a ring with the best mode that the kernel supports: deferred task work (a third off the
/// cost of an echo), else cooperative, else the default.
fn create(config: &RingConfig) -> Result<IoUring, SetupError> {
    let completions = completion_entries(config.connections, config.submissions);
    let builder = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_submit_all().setup_cqsize(completions);
        builder
    };
    let mut deferred = builder();
    deferred.setup_single_issuer().setup_defer_taskrun();
    let mut cooperative = builder();
    cooperative.setup_single_issuer().setup_coop_taskrun();
    let failed = |error| explain(config, SETUP, "set up an io_uring", error);
    let mut refused = None;
    for attempt in [deferred, cooperative, builder()] {
        match build_patiently(&attempt, config.submissions) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = Some(error),
            Err(error) => return Err(failed(error)),
        }
    }
    Err(failed(refused.expect("three attempts were made")))
}

/// Retries on ENOMEM. The kernel allocates all pages of a ring at once and fails if they are not
/// free at that moment, even if reclaiming page cache would free them.
fn build_patiently(builder: &io_uring::Builder, submissions: u32) -> io::Result<IoUring> {
    let mut pauses = MEMORY_PAUSES_MS.into_iter();
    loop {
        match (builder.build(submissions), pauses.next()) {
            (Err(error), Some(pause_ms)) if error.raw_os_error() == Some(libc::ENOMEM) => {
                std::thread::sleep(Duration::from_millis(pause_ms));
            }
            (built, _) => return built,
        }
    }
}

/// Room for a completion of every operation that [`Ring`](super::Ring) has in flight (half), and
/// for as many sockets that become readable in one turn (the other half).
fn completion_entries(connections: u32, submissions: u32) -> u32 {
    let wanted = connections.saturating_mul(2).max(submissions.saturating_mul(4));
    wanted.clamp(COMPLETIONS_MIN, COMPLETIONS_MAX).next_power_of_two()
}

/// Why `call` has failed, which was to do `what`.
fn explain(
    config: &RingConfig,
    call: &'static str,
    what: &'static str,
    error: io::Error,
) -> SetupError {
    match Errno::from_io_error(&error) {
        Some(Errno::NOSYS) if call == SETUP => SetupError::Missing,
        Some(errno @ (Errno::PERM | Errno::ACCESS | Errno::NOSYS)) => SetupError::Forbidden {
            call,
            errno,
            hint: forbidden_hint(std::fs::read_to_string(UNPRIVILEGED_SETTING).ok().as_deref()),
        },
        Some(Errno::NOMEM) => SetupError::NoMemory { bytes: ring_bytes(config) },
        _ => SetupError::System { what, source: error },
    }
}

/// What the kernel allocates for the queues and the list of receive buffers of a ring, bytes. Its own heads and
/// the rounding to pages are within the last 16 KiB.
fn ring_bytes(config: &RingConfig) -> u64 {
    const SUBMISSION_BYTES: u64 = 64 + 4;
    const COMPLETION_BYTES: u64 = 16;
    const BUFFER_BYTES: u64 = 16;
    let completions = u64::from(completion_entries(config.connections, config.submissions));
    let submissions = u64::from(config.submissions.next_power_of_two());
    completions * COMPLETION_BYTES
        + submissions * SUBMISSION_BYTES
        + u64::from(config.receive_buffers) * BUFFER_BYTES
        + 16 * 1024
}

fn forbidden_hint(setting: Option<&str>) -> String {
    match setting.map(str::trim) {
        Some("2") => "kernel.io_uring_disabled is 2, which forbids it for everybody; \
                      set it to 0 (`sysctl kernel.io_uring_disabled=0`)"
            .to_owned(),
        Some("1") => "kernel.io_uring_disabled is 1, which allows it only with CAP_SYS_ADMIN or \
                      to the group kernel.io_uring_group; set it to 0, or put the process into \
                      that group"
            .to_owned(),
        _ => "probably by the seccomp profile of a container (the default of Docker and \
              Kubernetes runtimes); use a profile that allows io_uring_setup, io_uring_enter and \
              io_uring_register"
            .to_owned(),
    }
}

fn check_features(ring: &IoUring, config: &RingConfig, release: &str) -> Result<(), SetupError> {
    let incomplete = |what| SetupError::Incomplete { release: release.to_owned(), what };
    let params = ring.params();
    if !params.is_feature_nodrop() {
        return Err(incomplete("IORING_FEAT_NODROP"));
    }
    if !params.is_feature_ext_arg() {
        return Err(incomplete("IORING_FEAT_EXT_ARG"));
    }
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|source| explain(config, REGISTER, "query the supported operations", source))?;
    match NEEDED.iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, name)) => Err(incomplete(name)),
        None => Ok(()),
    }
}

fn register_files(ring: &IoUring, config: &RingConfig) -> Result<(), SetupError> {
    let files = config.connections + EXTRA_FILES;
    ring.submitter().register_files_sparse(files).map_err(|source| {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        if Errno::from_io_error(&source) == Some(Errno::MFILE) {
            SetupError::TooManyFiles { connections: config.connections, files, limit }
        } else {
            explain(config, REGISTER, "register the file table", source)
        }
    })
}

/// `uname -r`.
fn kernel_release() -> String {
    let mut names = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: the pointer is to a live local of the right type; `uname` only writes through it.
    let outcome = unsafe { libc::uname(names.as_mut_ptr()) };
    assert_eq!(outcome, 0, "uname fails only for a bad pointer");
    // SAFETY: zero-filled and then written by `uname`; it is arrays of bytes throughout.
    let names = unsafe { names.assume_init() };
    let bytes = names.release.map(|byte| byte.cast_unsigned());
    CStr::from_bytes_until_nul(&bytes)
        .map(|release| release.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Major and minor number; `None` if the text has another form.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert_eq!(kernel_version("6.18.44-fc-v782"), Some((6, 18)));
        assert_eq!(kernel_version("5.4.0-150-generic"), Some((5, 4)));
        assert!(kernel_version("6.1-rc3") >= Some(KERNEL_MIN));
        assert!(kernel_version("6.0.19") < Some(KERNEL_MIN));
        assert_eq!(kernel_version("gvisor"), None);
        assert!(kernel_version(&kernel_release()).is_some());
    }

    #[test]
    fn refusals_say_what_to_do() {
        assert!(forbidden_hint(Some("2\n")).contains("sysctl kernel.io_uring_disabled=0"));
        assert!(forbidden_hint(Some("1\n")).contains("io_uring_group"));
        assert!(forbidden_hint(Some("0\n")).contains("seccomp"));
        assert!(forbidden_hint(None).contains("seccomp"));
        let failed = |call, errno: Errno| {
            explain(&RingConfig::default(), call, "try", errno.into()).to_string()
        };
        assert!(failed(SETUP, Errno::NOSYS).contains("CONFIG_IO_URING"));
        for (call, errno) in [(SETUP, Errno::PERM), (REGISTER, Errno::PERM), (ENTER, Errno::NOSYS)]
        {
            let why = failed(call, errno);
            assert!(why.starts_with(&format!("{call} is not permitted")), "{why}");
        }
        assert!(failed(SETUP, Errno::NOMEM).contains("KiB (ENOMEM)"));
        let old = SetupError::KernelTooOld { release: "5.15.0".into() }.to_string();
        assert!(old.contains("5.15.0") && old.contains("6.1"), "{old}");
    }

    #[test]
    fn table_beyond_the_file_limit_is_explained() {
        let Some(limit) = getrlimit(Resource::Nofile).current else { return };
        let Ok(connections) = u32::try_from(limit) else { return };
        if connections > CONNECTIONS_PER_SHARD_MAX {
            return;
        }
        let config = RingConfig { connections, ..RingConfig::default() };
        let Err(error) = set_up(&config) else { panic!("the table exceeds the limit") };
        assert!(error.to_string().contains(&format!("RLIMIT_NOFILE is {limit}")), "{error}");
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let bad = [
            RingConfig { connections: 0, ..RingConfig::default() },
            RingConfig { connections: CONNECTIONS_PER_SHARD_MAX + 1, ..RingConfig::default() },
            RingConfig { receive_buffers: 100, ..RingConfig::default() },
            RingConfig { submissions: 0, ..RingConfig::default() },
        ];
        for config in bad {
            assert!(matches!(set_up(&config), Err(SetupError::Config(_))), "{config:?}");
        }
    }

    #[test]
    fn completion_queue_holds_both_halves() {
        assert_eq!(completion_entries(10, 64), COMPLETIONS_MIN);
        assert_eq!(completion_entries(20_000, 256), 1 << 16);
        assert_eq!(completion_entries(1 << 20, 256), COMPLETIONS_MAX);
    }
}
