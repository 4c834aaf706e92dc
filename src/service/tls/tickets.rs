//! Session tickets (RFC 8446 §4.6.1) that any node with the same secrets can open: nothing is stored, and a client that
//! returns to another node needs no signature.
//!
//! ```text
//! ticket:  | name of the key: 16 | seed: 32 | sealed session | tag: 16 |
//!
//! secret ──HKDF──► key of a period ──HKDF, seed──► key of this ticket, for AES-256-GCM
//!                       └──HKDF──► its name
//! ```
//!
//! A key for each ticket, instead of a nonce: with one key, 2^32 random nonces of 12 bytes would be too many (NIST SP
//! 800-38D §8.3), and many nodes write as many within a day.

use std::sync::{Arc, RwLock};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use ring::rand::{SystemRandom, generate};
use rustls::server::ProducesTickets;

use crate::domain::command::Secret;

/// How long one key seals tickets, seconds. It opens them for as long again. So a ticket lasts between 12 and 24 hours:
/// over a night, and far less than the seven days that RFC 8446 §4.6.1 allows.
pub const PERIOD_S: u64 = 12 * 60 * 60;
/// Secrets, of which the first one seals. A rotation needs two.
pub const SECRETS_MAX: usize = 8;

const NAME_BYTES: usize = 16;
const SEED_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
/// A ticket without the session, bytes.
const OVERHEAD_BYTES: usize = NAME_BYTES + SEED_BYTES + TAG_BYTES;
/// Largest ticket, bytes. A session with the longest server name has fewer. Larger ones are not opened.
const TICKET_BYTES_MAX: usize = 1_024;

/// The tickets of a node.
pub struct Tickets {
    /// The clock, which the nodes share: Unix time in seconds.
    now_s: fn() -> u64,
    state: RwLock<State>,
}

struct State {
    secrets: Vec<Prk>,
    keys: Arc<PeriodKeys>,
}

impl Tickets {
    /// Tickets of all nodes with one of these secrets. The first one seals, all open. None: a random one, so that no
    /// other node, and not this one after its next start, can open them.
    ///
    /// # Panics
    /// If the system has no randomness.
    pub fn new(secrets: &[Secret], now_s: fn() -> u64) -> Self {
        Self { now_s, state: RwLock::new(State::new(secrets, now_s())) }
    }

    /// Replaces the secrets. Tickets of those that are gone are not opened any more.
    ///
    /// # Panics
    /// See [`Tickets::new`].
    pub fn replace(&self, secrets: &[Secret]) {
        *self.state.write().expect("no holder panics") = State::new(secrets, (self.now_s)());
    }

    /// The keys of this period.
    fn keys(&self) -> Arc<PeriodKeys> {
        let period = (self.now_s)() / PERIOD_S;
        let keys = Arc::clone(&self.state.read().expect("no holder panics").keys);
        if keys.period == period {
            return keys;
        }
        let mut state = self.state.write().expect("no holder panics");
        state.keys = Arc::new(PeriodKeys::derive(&state.secrets, period));
        Arc::clone(&state.keys)
    }
}

impl State {
    fn new(secrets: &[Secret], now_s: u64) -> Self {
        let salt = Salt::new(HKDF_SHA256, b"Delivery TLS tickets, version 1");
        let mut secrets: Vec<_> =
            secrets.iter().map(|secret| salt.extract(secret.expose().as_bytes())).collect();
        if secrets.is_empty() {
            secrets.push(salt.extract(&random().expect("the system has randomness")));
        }
        let keys = Arc::new(PeriodKeys::derive(&secrets, now_s / PERIOD_S));
        Self { secrets, keys }
    }
}

fn random() -> Option<[u8; 32]> {
    Some(generate(&SystemRandom::new()).ok()?.expose())
}

impl std::fmt::Debug for Tickets {
    /// Without the secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tickets").finish_non_exhaustive()
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    /// Until the key opens no more, seconds: [`PERIOD_S`] at least, and twice as long at most.
    fn lifetime(&self) -> u32 {
        let left_s = 2 * PERIOD_S - (self.now_s)() % PERIOD_S;
        u32::try_from(left_s).expect("at most a day")
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        self.keys().seal(&random()?, session)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.keys().open(ticket)
    }
}

/// The keys in use during a period.
struct PeriodKeys {
    period: u64,
    seals: PeriodKey,
    /// Of this period, the one before, and the next one, because the clocks of other nodes may be ahead.
    open: Vec<PeriodKey>,
}

impl PeriodKeys {
    /// `secrets`: one at least. `period`: time divided by [`PERIOD_S`].
    fn derive(secrets: &[Prk], period: u64) -> Self {
        let periods = [Some(period), period.checked_sub(1), period.checked_add(1)];
        let of =
            |secret| periods.into_iter().flatten().map(move |it| PeriodKey::derive(secret, it));
        let open = secrets.iter().flat_map(of).collect();
        Self { period, seals: PeriodKey::derive(&secrets[0], period), open }
    }

    /// `seed`: random. `None`: the session is too large.
    fn seal(&self, seed: &[u8; SEED_BYTES], session: &[u8]) -> Option<Vec<u8>> {
        let size = OVERHEAD_BYTES + session.len();
        if size > TICKET_BYTES_MAX {
            return None;
        }
        let mut ticket = Vec::with_capacity(size);
        ticket.extend(self.seals.name);
        ticket.extend(seed);
        ticket.extend(session);
        let (key, aad) = (self.seals.of_ticket(seed)?, Aad::from(self.seals.name));
        let sealed = &mut ticket[NAME_BYTES + SEED_BYTES..];
        let tag = key.seal_in_place_separate_tag(nonce(), aad, sealed).ok()?;
        ticket.extend(tag.as_ref());
        Some(ticket)
    }

    /// Any bytes may come.
    fn open(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > TICKET_BYTES_MAX {
            return None;
        }
        let (name, rest) = ticket.split_first_chunk::<NAME_BYTES>()?;
        let (seed, sealed) = rest.split_first_chunk::<SEED_BYTES>()?;
        // The name is no secret: whoever listens sees it.
        let key = self.open.iter().find(|key| key.name == *name)?.of_ticket(seed)?;
        let mut session = sealed.to_vec();
        let length = key.open_in_place(nonce(), Aad::from(name), &mut session).ok()?.len();
        session.truncate(length);
        Some(session)
    }
}

/// Each key is used once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

struct PeriodKey {
    name: [u8; NAME_BYTES],
    key: Prk,
}

impl PeriodKey {
    fn derive(secret: &Prk, period: u64) -> Self {
        let period = period.to_be_bytes();
        let info: [&[u8]; 2] = [b"period", &period];
        let key = secret.expand(&info, HKDF_SHA256).expect(SHORT).into();
        let mut name = [0; NAME_BYTES];
        let expand = |key: &Prk, name: &mut [u8]| key.expand(&[b"name"], NameLength)?.fill(name);
        expand(&key, &mut name).expect(SHORT);
        Self { name, key }
    }

    fn of_ticket(&self, seed: &[u8; SEED_BYTES]) -> Option<LessSafeKey> {
        let info: [&[u8]; 2] = [b"ticket", seed];
        let key = self.key.expand(&info, &AES_256_GCM).ok()?;
        Some(LessSafeKey::new(UnboundKey::from(key)))
    }
}

/// HKDF fails only if more than 255 hashes are wanted (RFC 5869 §2.3).
const SHORT: &str = "the output is short";

struct NameLength;

impl KeyType for NameLength {
    fn len(&self) -> usize {
        NAME_BYTES
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    const FIRST: &str = "a secret of at least thirty-two bytes";
    const SECOND: &str = "another secret of more than 32 bytes";
    const SESSION: &[u8] = b"the session";

    fn keys(secrets: &[&str], period: u64) -> PeriodKeys {
        let secrets: Vec<_> = secrets.iter().map(|text| Secret::new((*text).to_owned())).collect();
        PeriodKeys::derive(&State::new(&secrets, 0).secrets, period)
    }

    fn sealed(keys: &PeriodKeys) -> Vec<u8> {
        keys.seal(&[7; SEED_BYTES], SESSION).unwrap()
    }

    #[test]
    fn every_node_with_the_secret_opens_a_ticket() {
        let ticket = sealed(&keys(&[FIRST], 100));
        assert_eq!(ticket.len(), OVERHEAD_BYTES + SESSION.len());
        assert_eq!(keys(&[FIRST], 100).open(&ticket).unwrap(), SESSION);
        assert!(keys(&[SECOND], 100).open(&ticket).is_none());
        assert!(keys(&[], 100).open(&ticket).is_none());
        let random = keys(&[], 100);
        assert_eq!(random.open(&sealed(&random)).unwrap(), SESSION);
    }

    #[test]
    fn ticket_is_opened_in_its_period_in_the_next_and_by_clocks_that_are_behind() {
        let ticket = sealed(&keys(&[FIRST], 100));
        for (period, opens) in [(98, false), (99, true), (100, true), (101, true), (102, false)] {
            assert_eq!(keys(&[FIRST], period).open(&ticket).is_some(), opens, "{period}");
        }
        for period in [0, u64::MAX] {
            let keys = keys(&[FIRST], period);
            assert_eq!(keys.open(&sealed(&keys)).unwrap(), SESSION);
        }
    }

    #[test]
    fn first_secret_seals_and_all_open() {
        let (old, both, new) = (keys(&[FIRST], 5), keys(&[SECOND, FIRST], 5), keys(&[SECOND], 5));
        assert!(both.open(&sealed(&old)).is_some());
        assert!(new.open(&sealed(&both)).is_some());
        assert!(new.open(&sealed(&old)).is_none());
    }

    /// Computed with the HKDF and AESGCM of the Python package `cryptography`: nodes of different versions share tickets.
    #[test]
    fn ticket_has_these_bytes() {
        let ticket = sealed(&keys(&[FIRST], 100));
        let hex: String = ticket.iter().map(|byte| format!("{byte:02x}")).collect();
        let golden = [
            "daaf97255b098b4b2e645a053fb5d817",
            "0707070707070707070707070707070707070707070707070707070707070707",
            "673b8b39081b348a523ff4",
            "f376048a22af66196e59901f98542bf3",
        ];
        assert_eq!(hex, golden.concat());
    }

    #[test]
    fn session_too_large_for_a_ticket_has_none() {
        let keys = keys(&[FIRST], 1);
        let fits = vec![1; TICKET_BYTES_MAX - OVERHEAD_BYTES];
        let ticket = keys.seal(&[0; SEED_BYTES], &fits).unwrap();
        assert_eq!(keys.open(&ticket).unwrap(), fits);
        assert!(keys.seal(&[0; SEED_BYTES], &[&fits[..], &[1]].concat()).is_none());
    }

    static NOW_S: AtomicU64 = AtomicU64::new(1_000 * PERIOD_S);

    #[test]
    fn keys_follow_the_clock_and_the_lifetime_says_how_long_they_open() {
        let tickets = Tickets::new(&[], || NOW_S.load(Ordering::Relaxed));
        let first = tickets.encrypt(SESSION).unwrap();
        assert_ne!(first, tickets.encrypt(SESSION).unwrap(), "each ticket has its own seed");
        let lifetime = u64::from(tickets.lifetime());
        assert_eq!(lifetime, 2 * PERIOD_S);
        NOW_S.fetch_add(lifetime - 1, Ordering::Relaxed);
        assert_eq!(tickets.decrypt(&first).unwrap(), SESSION);
        assert_eq!(u64::from(tickets.lifetime()), PERIOD_S + 1);
        let second = tickets.encrypt(SESSION).unwrap();
        NOW_S.fetch_add(1, Ordering::Relaxed);
        assert!(tickets.decrypt(&first).is_none());
        assert_eq!(tickets.decrypt(&second).unwrap(), SESSION);
        tickets.replace(&[Secret::new(FIRST.to_owned())]);
        assert!(tickets.decrypt(&second).is_none());
    }

    #[test]
    fn debug_shows_no_secret() {
        let tickets = Tickets::new(&[Secret::new(FIRST.to_owned())], || 0);
        assert_eq!(format!("{tickets:?}"), "Tickets { .. }");
    }

    proptest! {
        #[test]
        fn what_is_sealed_is_opened(
            session in proptest::collection::vec(any::<u8>(), 0..900),
            seed: [u8; 32],
            period: u64,
        ) {
            let keys = keys(&[SECOND, FIRST], period);
            let ticket = keys.seal(&seed, &session).unwrap();
            prop_assert_eq!(keys.open(&ticket), Some(session));
        }

        #[test]
        fn changed_ticket_is_not_opened(
            index: proptest::sample::Index, flip in 1..=u8::MAX, cut: proptest::sample::Index
        ) {
            let keys = keys(&[FIRST], 1);
            let ticket = sealed(&keys);
            prop_assert!(keys.open(&ticket[..cut.index(ticket.len())]).is_none());
            prop_assert!(keys.open(&[&ticket[..], &[flip]].concat()).is_none());
            let mut changed = ticket.clone();
            changed[index.index(ticket.len())] ^= flip;
            prop_assert!(keys.open(&changed).is_none());
        }

        #[test]
        fn bytes_that_are_no_ticket_are_not_opened(
            bytes in proptest::collection::vec(any::<u8>(), 0..2_000), has_name: bool
        ) {
            let keys = keys(&[FIRST], 1);
            let name = if has_name { &keys.seals.name[..] } else { &[] };
            prop_assert!(keys.open(&[name, &bytes].concat()).is_none());
        }
    }
}
