//! A publisher that rotates its keys and fails.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// Serves a document over HTTP, each request on its own connection.
struct Publisher {
    url: String,
    document: Arc<Mutex<String>>,
    requests: Arc<AtomicU64>,
}

impl Publisher {
    fn start(document: Value) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        let document = Arc::new(Mutex::new(document.to_string()));
        let requests = Arc::new(AtomicU64::new(0));
        let (shown, counted) = (Arc::clone(&document), Arc::clone(&requests));
        // The thread ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 4096]);
                counted.fetch_add(1, Ordering::SeqCst);
                let body = shown.lock().unwrap().clone();
                let status = if body.is_empty() { "500 Oops" } else { "200 OK" };
                let length = body.len();
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n");
                let _ = write!(stream, "{head}Connection: close\r\n\r\n{body}");
            }
        });
        Self { url, document, requests }
    }

    fn publish(&self, keys: &[Value]) {
        *self.document.lock().unwrap() = json!({ "keys": keys }).to_string();
    }

    /// An authenticator that has made its first fetch. No test takes as long as its intervals, so
    /// that only unknown keys cause further ones, however slow the machine is.
    async fn authenticator(&self) -> (Arc<Authenticator>, Arc<AuthCounters>) {
        const LONG: Duration = Duration::from_secs(3600);
        let counters = Arc::new(AuthCounters::default());
        let config = JwksConfig {
            url: Secret::new(self.url.clone()),
            refresh: LONG,
            refetch_interval: LONG,
            timeout: LONG,
        };
        let auth =
            Authenticator::jwt(&OwnKeys::default(), vec![config], rules(), Arc::clone(&counters))
                .unwrap();
        while auth.publishers_not_fetched() > 0 {
            tokio::task::yield_now().await;
        }
        (auth, counters)
    }
}

#[tokio::test]
async fn rotation_of_published_keys_is_survived_with_one_fetch_for_all() {
    let (old, new) = (Signer::ec(), Signer::rsa());
    let publisher = Publisher::start(json!({ "keys": [old.jwk("old")] }));
    let (auth, counters) = publisher.authenticator().await;
    let token = old.sign(Some("old"), &claims());
    assert!(check(&auth, &token, "").await.is_ok());

    publisher.publish(&[old.jwk("old"), new.jwk("new")]);
    let before = publisher.requests.load(Ordering::SeqCst);
    let mut checks = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let (auth, token) = (Arc::clone(&auth), new.sign(Some("new"), &claims()));
        checks.spawn(async move { check(&auth, &token, "alice").await });
    }
    for outcome in checks.join_all().await {
        assert_eq!(outcome.map(|found| found.user), Ok("alice".into()));
    }
    assert_eq!(publisher.requests.load(Ordering::SeqCst), before + 1);
    assert_eq!(counters.jwks_keys.get(), 2);

    // Invented key ids cause no further fetch within the interval, and do not affect other tokens.
    for made_up in ["x", "y", "z"] {
        let refused = check(&auth, &new.sign(Some(made_up), &claims()), "").await;
        assert_eq!(refused, Err(AuthFailure::KeyUnknown));
    }
    assert_eq!(publisher.requests.load(Ordering::SeqCst), before + 1);
    assert!(check(&auth, &token, "").await.is_ok());
}

#[tokio::test]
async fn key_id_of_one_key_does_not_admit_anothers_signature() {
    let (ours, theirs) = (Signer::ec(), Signer::ec());
    let publisher = Publisher::start(json!({ "keys": [ours.jwk("a")] }));
    let (auth, _) = publisher.authenticator().await;
    let refused = check(&auth, &theirs.sign(Some("a"), &claims()), "").await;
    assert_eq!(refused, Err(AuthFailure::SignatureWrong));
    // A token without a key id is checked with every key.
    assert!(check(&auth, &ours.sign(None, &claims()), "").await.is_ok());
    let refused = check(&auth, &hs256_token(&claims()), "").await;
    assert_eq!(refused, Err(AuthFailure::AlgorithmRefused));
}

/// A publisher may put another key under the same id, of the same kind or of another, or publish keys without ids (RFC
/// 7517 §4.5).
#[tokio::test]
async fn key_that_was_replaced_under_its_id_is_fetched() {
    for (old_id, id) in [(Some("a"), Some("a")), (None, None), (Some("a"), None)] {
        for new in [Signer::ec(), Signer::rsa()] {
            let old = Signer::ec();
            let document = |signer: &Signer, id: Option<&str>| {
                let mut key = signer.jwk(id.unwrap_or_default());
                if id.is_none() {
                    key.as_object_mut().unwrap().remove("kid");
                }
                key
            };
            let publisher = Publisher::start(json!({ "keys": [document(&old, old_id)] }));
            let (auth, _) = publisher.authenticator().await;
            assert!(check(&auth, &old.sign(old_id, &claims()), "").await.is_ok());
            publisher.publish(&[document(&new, id)]);
            let token = new.sign(id, &claims());
            assert_eq!(auth.judge(Some(&token)), Ok(()), "its key has to be fetched first");
            assert!(check(&auth, &token, "").await.is_ok(), "{id:?}");
            assert!(check(&auth, &old.sign(old_id, &claims()), "").await.is_err());
            assert_eq!(publisher.requests.load(Ordering::SeqCst), 2);
            assert!(auth.judge(Some(&old.sign(old_id, &claims()))).is_err(), "no fetch is due");
        }
    }
}

#[tokio::test]
async fn all_sources_count_together_and_own_keys_can_be_replaced() {
    let (file, one, two) = (Signer::ed(), Signer::ec(), Signer::rsa());
    let publishers = [(&one, "one"), (&two, "two")]
        .map(|(signer, id)| Publisher::start(json!({ "keys": [signer.jwk(id)] })));
    let published = publishers.iter().map(|it| JwksConfig::new(Secret::new(it.url.clone())));
    let counters = Arc::new(AuthCounters::default());
    let own = OwnKeys { pem: pem(&file.public_pem).pem, ..secrets([SECRET, "another"]) };
    let auth = Authenticator::jwt(&own, published.collect(), rules(), counters).unwrap();
    while auth.publishers_not_fetched() > 0 {
        tokio::task::yield_now().await;
    }
    let new = "the next secret";
    let is_valid = async |signer: &Signer, id| check(&auth, &signer.sign(id, &claims()), "").await;
    for (signer, id) in [(&one, Some("one")), (&two, Some("two")), (&file, None)] {
        assert!(is_valid(signer, id).await.is_ok(), "{id:?}");
    }
    for (secret, id) in [(SECRET, None), ("another", Some("x"))] {
        assert!(is_valid(&Signer::hs256(secret), id).await.is_ok());
    }
    assert_eq!(is_valid(&Signer::hs256(new), None).await, Err(AuthFailure::SignatureWrong));

    // A rotation: first both, then only the new one.
    auth.replace_own(&secrets(["another", new])).unwrap();
    for secret in ["another", new] {
        assert!(is_valid(&Signer::hs256(secret), None).await.is_ok());
    }
    auth.replace_own(&secrets([new])).unwrap();
    let refused = is_valid(&Signer::hs256("another"), None).await;
    assert_eq!(refused, Err(AuthFailure::SignatureWrong));
    assert!(is_valid(&file, None).await.is_err() && is_valid(&one, Some("one")).await.is_ok());
    assert_eq!(auth.replace_own(&secrets([""])), Err(KeyError::Empty));
    assert!(is_valid(&Signer::hs256(new), None).await.is_ok(), "the old ones stay");
}

#[tokio::test]
async fn failed_fetch_keeps_the_old_keys() {
    let (old, new) = (Signer::ec(), Signer::ec());
    let publisher = Publisher::start(json!({ "keys": [old.jwk("old")] }));
    let (auth, counters) = publisher.authenticator().await;
    assert!(check(&auth, &old.sign(Some("old"), &claims()), "").await.is_ok());
    for broken in ["", "rubbish", r#"{"keys": []}"#] {
        *publisher.document.lock().unwrap() = broken.to_owned();
        let refused = check(&auth, &new.sign(Some("new"), &claims()), "").await;
        assert_eq!(refused, Err(AuthFailure::KeyUnknown));
        assert!(check(&auth, &old.sign(Some("old"), &claims()), "").await.is_ok());
    }
    assert_eq!(counters.jwks_failures.get(), 1, "one fetch, then none for a while");
}

#[tokio::test]
async fn without_keys_clients_get_503_and_retry_after() {
    // A port without a listener.
    let url = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://user:password@{}/keys", listener.local_addr().unwrap())
    };
    let counters = Arc::new(AuthCounters::default());
    let published = vec![JwksConfig::new(Secret::new(url))];
    let own = secrets([SECRET]);
    let auth = Authenticator::jwt(&own, published, rules(), Arc::clone(&counters)).unwrap();
    assert_eq!(auth.publishers_not_fetched(), 1);
    assert!(check(&auth, &hs256_token(&claims()), "").await.is_ok(), "its key is at hand");
    let token = Signer::ec().sign(Some("a"), &claims());
    for refused in 1..=2 {
        assert_eq!(
            auth.judge(Some(&token)),
            Ok(()),
            "it cannot be judged yet, whether or not a fetch is due"
        );
        assert_eq!(check(&auth, &token, "").await, Err(AuthFailure::KeysUnavailable));
        assert_eq!(counters.keys_unavailable.get(), refused);
    }
    assert!(!format!("{auth:?}").contains("password"));
}
