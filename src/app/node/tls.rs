//! TLS of the ports of clients: certificates and ticket secrets are read at start, and those of files again on SIGHUP and
//! when the files change.

use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::sync::watch;

use super::followed_files::follow;
use super::metrics::register;
use crate::app::admin::{Collector, MetricsPage};
use crate::app::config::{Settings, TlsFiles, TlsPair, tls_files};
use crate::domain::counters::MetricKind;
use crate::service::events::timestamp::unix_ms;
use crate::service::tls::certificates::{Certificates, CertifiedPair};
use crate::service::tls::server_config;
use crate::service::tls::tickets::Tickets;

/// A certificate that is valid for less than this is a warning at start and when it is replaced.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 24 * 60 * 60);

crate::counters! {
    /// Counters of the files of TLS.
    struct TlsFileCounters of SharedCounter {
        Counter reloads: "Certificates or ticket secrets replaced while the node ran",
        Counter reload_failures: "Certificates or ticket secrets that could not be read again; the old ones stay in use",
    }
}

/// TLS of a node.
pub(super) struct Tls {
    certificates: Arc<Certificates>,
    tickets: Arc<Tickets>,
    files: TlsFiles,
    expiries: Arc<RwLock<Vec<Expiry>>>,
    counters: Arc<TlsFileCounters>,
}

impl Tls {
    /// Reads the files. `None`: the node has no certificate.
    ///
    /// # Errors
    /// A file cannot be used. The text names its setting.
    pub(super) fn new(
        settings: &Settings,
        collectors: &mut Vec<Collector>,
    ) -> Result<Option<Self>, String> {
        let files = tls_files(settings).map_err(|error| error.to_string())?;
        if files.pairs.is_empty() {
            return Ok(None);
        }
        if files.ticket_secrets.is_empty() {
            tracing::info!(
                "TLS_TICKET_SECRET is not set: a client that returns to another node, or after a restart, costs a full handshake"
            );
        }
        let tls = Self {
            certificates: Arc::new(Certificates::new(&pairs(&files))),
            tickets: Arc::new(Tickets::new(&files.ticket_secrets, unix_s)),
            expiries: Arc::new(RwLock::new(expiries(&files))),
            files,
            counters: register("tls_", collectors),
        };
        tell_certificates(&tls.files);
        let expiries = Arc::clone(&tls.expiries);
        collectors.push(Box::new(move |page| {
            for expiry in &*expiries.read().expect("no holder panics") {
                expiry.export(page, unix_s());
            }
        }));
        Ok(Some(tls))
    }

    /// How the handshakes of a port are made. `alpn`: its protocols, the preferred one first.
    pub(super) fn server_config(&self, alpn: &[&[u8]]) -> ServerConfig {
        server_config(self.certificates.clone(), Arc::clone(&self.tickets), alpn)
    }

    /// Reads the files again when `asked` changes, and from time to time, as long as the runtime lives.
    pub(super) fn follow_files(mut self, settings: &Settings, asked: watch::Receiver<u64>) {
        let settings = settings.clone();
        tokio::spawn(async move {
            let (first, counters) = (self.files.clone(), Arc::clone(&self.counters));
            let read = move || tls_files(&settings);
            let replace = |files: &TlsFiles| self.replace(files);
            let counted = (&counters.reloads, &counters.reload_failures);
            follow("certificates and ticket secrets", first, asked, read, replace, counted).await;
        });
    }

    fn replace(&mut self, files: &TlsFiles) -> Result<(), String> {
        let now_s = unix_s();
        let has_expired = |pair: &TlsPair| pair.pair.chain().expires_at_s() < now_s;
        let is_served = |new: &TlsPair| {
            self.files.pairs.iter().any(|old| old.file == new.file && !has_expired(old))
        };
        if let Some(TlsPair { file, .. }) =
            files.pairs.iter().find(|new| has_expired(new) && is_served(new))
        {
            let file = file.display();
            return Err(format!("TLS_CERT: `{file}` has expired, and the one in use has not"));
        }
        // Otherwise a random secret would be replaced by another one.
        if files.ticket_secrets != self.files.ticket_secrets {
            self.tickets.replace(&files.ticket_secrets);
        }
        self.certificates.replace(&pairs(files));
        *self.expiries.write().expect("no holder panics") = expiries(files);
        self.files = files.clone();
        tell_certificates(&self.files);
        Ok(())
    }
}

fn tell_certificates(files: &TlsFiles) {
    let now_s = unix_s();
    for TlsPair { file, pair } in &files.pairs {
        let (file, names) = (file.display(), pair.chain().names().join(", "));
        let names = if names.is_empty() { "no DNS name" } else { &names };
        let (from_s, expires_s) = (pair.chain().valid_from_s(), pair.chain().expires_at_s());
        let left = Duration::from_secs(expires_s.saturating_sub(now_s));
        if expires_s < now_s {
            tracing::error!(
                "TLS_CERT: `{file}` ({names}) has expired: clients refuse it until the file is replaced"
            );
        } else if from_s > now_s {
            tracing::error!(
                "TLS_CERT: `{file}` ({names}) is not valid yet: clients refuse it, or the clock of this machine is wrong"
            );
        } else if left < EXPIRES_SOON {
            tracing::warn!("TLS_CERT: `{file}` ({names}) expires in {} h", left.as_secs() / 3600);
        } else {
            let days = left.as_secs() / 86_400;
            tracing::info!("TLS_CERT: `{file}` ({names}) is valid for {days} days");
        }
    }
}

fn unix_s() -> u64 {
    unix_ms() / 1_000
}

fn pairs(files: &TlsFiles) -> Vec<CertifiedPair> {
    files.pairs.iter().map(|pair| pair.pair.clone()).collect()
}

fn expiries(files: &TlsFiles) -> Vec<Expiry> {
    let of = |TlsPair { file, pair }: &TlsPair| Expiry {
        file: file.clone(),
        name: pair.chain().names().first().cloned().unwrap_or_default(),
        at_s: pair.chain().expires_at_s(),
    };
    files.pairs.iter().map(of).collect()
}

/// When a certificate chain expires.
struct Expiry {
    file: PathBuf,
    /// The first name of the certificate.
    name: String,
    /// Unix time in seconds.
    at_s: u64,
}

impl Expiry {
    #[allow(clippy::cast_precision_loss, reason = "exact up to 2^53")]
    fn export(&self, page: &mut MetricsPage, now_s: u64) {
        let name = "delivery_tls_certificate_expires_in_seconds";
        let help =
            "Time until the first certificate of a chain expires; below 0: since it has expired.";
        let file = self.file.display().to_string();
        let labels = [("file", file.as_str()), ("name", self.name.as_str())];
        let left = i128::from(self.at_s) - i128::from(now_s);
        page.sample(MetricKind::Gauge, name, help, &labels, left as f64);
    }
}
