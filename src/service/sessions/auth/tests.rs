//! Valid and invalid tokens of every kind.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use jsonwebtoken::{Algorithm, Header};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256,
    RsaKeyPair, RsaPublicKeyComponents,
};
use serde_json::{Value, json};

use super::*;

mod published;

/// A key made for these tests.
const RSA_PRIVATE: &str = include_str!("testdata/rsa_private.pem");
const RSA_PUBLIC: &str = include_str!("testdata/rsa_public.pem");
const RSA_1024_PUBLIC: &str = include_str!("testdata/rsa_1024_public.pem");
const SECRET: &str = "a secret of these tests, of 32 bytes or more";

/// A pair of keys. Signs with its own code, so that the verifier is not its own oracle.
pub(crate) struct Signer {
    algorithm: Algorithm,
    private: Private,
    public_pem: String,
}

enum Private {
    Hmac(hmac::Key),
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

impl Signer {
    pub(crate) fn hs256(secret: &str) -> Self {
        let private = Private::Hmac(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()));
        Self { algorithm: Algorithm::HS256, private, public_pem: String::new() }
    }

    pub(crate) fn rsa() -> Self {
        let pair = rcgen::KeyPair::from_pem(RSA_PRIVATE).unwrap();
        let private = Private::Rsa(RsaKeyPair::from_pkcs8(&pair.serialize_der()).unwrap());
        Self { algorithm: Algorithm::RS256, private, public_pem: RSA_PUBLIC.to_owned() }
    }

    fn ec() -> Self {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let signing = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let random = SystemRandom::new();
        let private = EcdsaKeyPair::from_pkcs8(signing, &pair.serialize_der(), &random).unwrap();
        let public_pem = pair.public_key_pem();
        Self { algorithm: Algorithm::ES256, private: Private::Ec(private), public_pem }
    }

    fn ed() -> Self {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let private = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&pair.serialize_der()).unwrap();
        let public_pem = pair.public_key_pem();
        Self { algorithm: Algorithm::EdDSA, private: Private::Ed(private), public_pem }
    }

    pub(crate) fn sign(&self, kid: Option<&str>, claims: &Value) -> Secret {
        let header = Header { kid: kid.map(str::to_owned), ..Header::new(self.algorithm) };
        let signed = format!("{}.{}", part(&serde_json::to_value(header).unwrap()), part(claims));
        let message = signed.as_bytes();
        let random = SystemRandom::new();
        let signature = match &self.private {
            Private::Hmac(key) => hmac::sign(key, message).as_ref().to_vec(),
            Private::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
                signature
            }
            Private::Ec(pair) => pair.sign(&random, message).unwrap().as_ref().to_vec(),
            Private::Ed(pair) => pair.sign(message).as_ref().to_vec(),
        };
        Secret::new(format!("{signed}.{}", BASE64URL.encode(signature)))
    }

    fn jwk(&self, kid: &str) -> Value {
        let text = |bytes: &[u8]| BASE64URL.encode(bytes);
        match &self.private {
            Private::Hmac(_) => unreachable!("a secret is not published"),
            Private::Rsa(pair) => {
                let public = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({ "kid": kid, "kty": "RSA", "alg": "RS256", "n": text(&public.n), "e": text(&public.e) })
            }
            Private::Ec(pair) => {
                // An uncompressed point (SEC 1, §2.3.3): 4, x, y.
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({ "kid": kid, "kty": "EC", "alg": "ES256", "crv": "P-256", "x": text(x), "y": text(y) })
            }
            Private::Ed(pair) => {
                let x = text(pair.public_key().as_ref());
                json!({ "kid": kid, "kty": "OKP", "alg": "EdDSA", "crv": "Ed25519", "x": x })
            }
        }
    }
}

fn now_s() -> u64 {
    unix_ms() / 1000
}

fn claims() -> Value {
    json!({ "sub": "alice", "iss": "realchat-auth", "aud": "realchat", "exp": now_s() + 600 })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn without(name: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(name);
    claims
}

fn rules() -> ClaimRules {
    ClaimRules {
        issuer: Some("realchat-auth".into()),
        audience: Some("realchat".into()),
        leeway: Duration::from_secs(30),
    }
}

fn jwt(own: &OwnKeys) -> Arc<Authenticator> {
    Authenticator::jwt(own, Vec::new(), rules(), Arc::default()).unwrap()
}

fn secrets<const N: usize>(secrets: [&str; N]) -> OwnKeys {
    let secrets = secrets.map(|secret| Secret::new(secret.into())).into();
    OwnKeys { secrets, pem: None }
}

fn pem(pem: &str) -> OwnKeys {
    OwnKeys { secrets: Vec::new(), pem: Some(pem.into()) }
}

fn hs256() -> Arc<Authenticator> {
    jwt(&secrets([SECRET]))
}

fn hs256_token(claims: &Value) -> Secret {
    Signer::hs256(SECRET).sign(None, claims)
}

/// An unsigned part of a token.
fn part(value: &Value) -> String {
    BASE64URL.encode(value.to_string())
}

async fn check(auth: &Authenticator, token: &Secret, user: &str) -> Result<Identity, AuthFailure> {
    match auth.check(Some(token), user) {
        TokenCheck::Done(outcome) => outcome,
        TokenCheck::Pending(outcome) => outcome.await,
    }
}

#[tokio::test]
async fn token_of_each_algorithm_identifies_its_bearer() {
    let found = check(&hs256(), &hs256_token(&claims()), "alice").await.unwrap();
    assert_eq!(found.user, "alice");
    assert!(found.expires_at_s.unwrap() >= now_s() + 600, "the leeway is added");
    for signer in [Signer::rsa(), Signer::ec(), Signer::ed()] {
        let auth = jwt(&pem(&signer.public_pem));
        for user in ["alice", ""] {
            let found = check(&auth, &signer.sign(None, &claims()), user).await;
            assert_eq!(found.map(|found| found.user), Ok("alice".into()), "{:?}", signer.algorithm);
        }
    }
}

#[tokio::test]
async fn token_of_another_user_is_refused() {
    let token = hs256_token(&claims());
    let refused = check(&hs256(), &token, "bob").await.unwrap_err();
    assert_eq!((refused, refused.status()), (AuthFailure::UserMismatch, 403));
    let TokenCheck::Done(missing) = hs256().check(None, "alice") else { panic!("not at once") };
    assert_eq!(missing, Err(AuthFailure::TokenMissing));
    assert_eq!(AuthFailure::TokenMissing.status(), 401);
}

#[tokio::test]
async fn each_wrong_claim_has_its_own_failure() {
    let long = "x".repeat(ID_BYTES_MAX + 1);
    for (claims, expected) in [
        (with("exp", json!(now_s() - 31)), AuthFailure::Expired),
        (with("exp", json!(-5)), AuthFailure::Expired),
        (without("exp"), AuthFailure::ExpiryMissing),
        (with("exp", json!("tomorrow")), AuthFailure::Malformed),
        (with("nbf", json!(now_s() + 60)), AuthFailure::NotYetValid),
        (with("iss", json!("elsewhere")), AuthFailure::IssuerRefused),
        (without("iss"), AuthFailure::IssuerRefused),
        (with("aud", json!("others")), AuthFailure::AudienceRefused),
        (with("aud", json!([])), AuthFailure::AudienceRefused),
        (without("aud"), AuthFailure::AudienceRefused),
        (without("sub"), AuthFailure::SubjectUnusable),
        (with("sub", json!("")), AuthFailure::SubjectUnusable),
        (with("sub", json!("a\nb")), AuthFailure::SubjectUnusable),
        (with("sub", json!(long)), AuthFailure::SubjectUnusable),
        (with("sub", json!(5)), AuthFailure::Malformed),
    ] {
        let found = check(&hs256(), &hs256_token(&claims), "").await;
        assert_eq!(found, Err(expected), "{claims}");
    }
    for claims in [
        with("exp", json!(now_s() - 5)),
        with("exp", json!(now_s() as f64 + 0.5)),
        with("exp", json!(1e300)),
        with("nbf", json!(now_s() + 5)),
        with("aud", json!(["others", "realchat"])),
    ] {
        assert!(check(&hs256(), &hs256_token(&claims), "").await.is_ok(), "{claims}");
    }
}

#[tokio::test]
async fn algorithms_cannot_be_confused() {
    let rsa = Signer::rsa();
    let auth = jwt(&pem(&rsa.public_pem));
    // The public key used as an HMAC secret.
    let forged = Signer::hs256(&rsa.public_pem).sign(None, &claims());
    let refused = check(&auth, &forged, "").await;
    assert_eq!(refused, Err(AuthFailure::AlgorithmRefused));

    for algorithm in ["none", "None", "nOnE", "HS255", ""] {
        let header = part(&json!({ "alg": algorithm, "typ": "JWT" }));
        for signature in ["", "AAAA"] {
            let token = Secret::new(format!("{header}.{}.{signature}", part(&claims())));
            for auth in [&auth, &hs256()] {
                let refused = check(auth, &token, "").await;
                assert_eq!(refused, Err(AuthFailure::AlgorithmRefused), "{algorithm}");
            }
        }
    }
    // A stronger hash of the same family is also refused.
    let key = Private::Hmac(hmac::Key::new(hmac::HMAC_SHA512, SECRET.as_bytes()));
    let stronger = Signer { algorithm: Algorithm::HS512, private: key, public_pem: String::new() };
    let refused = check(&hs256(), &stronger.sign(None, &claims()), "").await;
    assert_eq!(refused, Err(AuthFailure::AlgorithmRefused));
}

#[tokio::test]
async fn tampered_token_has_a_wrong_signature_and_garbage_is_malformed() {
    let token = hs256_token(&claims());
    let parts: Vec<_> = token.expose().split('.').collect();
    let tampered = format!("{}.{}.{}", parts[0], part(&with("sub", json!("bob"))), parts[2]);
    let refused = check(&hs256(), &Secret::new(tampered), "").await;
    assert_eq!(refused, Err(AuthFailure::SignatureWrong));
    let critical = part(&json!({ "alg": "HS256", "crit": ["b64"], "b64": false }));
    for rubbish in [
        String::new(),
        ".".into(),
        "..".into(),
        "a.b".into(),
        "a.b.c.d".into(),
        "\u{1f980}.\u{1f980}.\u{1f980}".into(),
        format!("{}.{}", parts[0], parts[1]),
        format!("{critical}.{}.{}", parts[1], parts[2]),
    ] {
        let refused = check(&hs256(), &Secret::new(rubbish.clone()), "").await;
        assert_eq!(refused, Err(AuthFailure::Malformed), "{rubbish}");
    }
}

#[test]
fn key_files_are_checked_for_their_kind() {
    let (ec, ed) = (Signer::ec(), Signer::ed());
    let both = format!("{}\n{}", ec.public_pem, ed.public_pem);
    assert_eq!(KeySet::of_own(&pem(&both)).unwrap().len(), 2);
    let private = KeySet::of_own(&pem(RSA_PRIVATE)).unwrap_err();
    assert_eq!(private, KeyError::Private);
    let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    for bad in [b"".as_slice(), b"rubbish", b"\xff", p384.public_key_pem().as_bytes()] {
        assert_eq!(
            KeySet::of_own(&OwnKeys { pem: Some(bad.to_vec()), ..OwnKeys::default() }).unwrap_err(),
            KeyError::Unknown
        );
    }
    assert_eq!(KeySet::of_own(&secrets([""])).unwrap_err(), KeyError::Empty);
}

#[test]
fn unusable_published_keys_are_ignored() {
    let mut for_encryption = Signer::ec().jwk("b");
    for_encryption["use"] = json!("enc");
    let mut for_another_algorithm = Signer::ec().jwk("c");
    for_another_algorithm["alg"] = json!("ES384");
    let mut to_sign = Signer::ec().jwk("f");
    to_sign["key_ops"] = json!(["sign"]);
    let mut to_verify = Signer::ec().jwk("g");
    to_verify["key_ops"] = json!(["verify"]);
    let secret = json!({ "kty": "oct", "kid": "d", "k": "c2VjcmV0", "alg": "HS256" });
    let unknown = json!({ "kty": "AKP", "kid": "e" });
    let keys = json!({ "keys": [
        Signer::ec().jwk("a"), for_encryption, for_another_algorithm, to_sign, to_verify, secret, unknown, 7
    ]});
    let usable = KeySet::of_jwks(&keys.to_string()).unwrap();
    assert_eq!(usable.len(), 2);
    assert_eq!(usable.of_id(Some("g")).count(), 1);
    for useless in ["", "[]", "{}", r#"{"keys": []}"#, r#"{"keys": [{"kty": "oct", "k": "eA"}]}"#] {
        assert!(KeySet::of_jwks(useless).is_none(), "{useless}");
    }
}

#[test]
fn rsa_key_with_leading_zeros_verifies_and_a_short_one_is_refused() {
    let rsa = Signer::rsa();
    let mut jwk = rsa.jwk("a");
    for number in ["n", "e"] {
        let bytes = BASE64URL.decode(jwk[number].as_str().unwrap()).unwrap();
        jwk[number] = json!(BASE64URL.encode([&[0, 0][..], &bytes].concat()));
    }
    let keys = [Arc::new(KeySet::of_jwks(&json!({ "keys": [jwk] }).to_string()).unwrap())];
    let token = rsa.sign(Some("a"), &claims());
    let header = verify::header(token.expose()).unwrap();
    assert!(verify::verify(token.expose(), &header, &keys, &rules(), "", now_s()).is_ok());

    assert_eq!(KeySet::of_own(&pem(RSA_1024_PUBLIC)).err(), Some(KeyError::RsaTooShort));
    let short = json!({ "kty": "RSA", "n": BASE64URL.encode([0xff; 128]), "e": "AQAB" });
    assert!(KeySet::of_jwks(&json!({ "keys": [short] }).to_string()).is_none());
}

/// Signatures that neither ring nor this file made: RFC 7515, appendices A.2 and A.3.
#[test]
fn examples_of_rfc_7515_verify() {
    const CLAIMS: &str = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    signature::install();
    let rules = ClaimRules { issuer: None, audience: None, leeway: Duration::ZERO };
    for (header, signature, key) in [
        (
            "eyJhbGciOiJSUzI1NiJ9",
            "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw",
            json!({ "kty": "RSA", "e": "AQAB", "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ" }),
        ),
        (
            "eyJhbGciOiJFUzI1NiJ9",
            "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
            json!({ "kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0" }),
        ),
    ] {
        let token = format!("{header}.{CLAIMS}.{signature}");
        let keys = [Arc::new(KeySet::of_jwks(&json!({ "keys": [key] }).to_string()).unwrap())];
        let header = verify::header(&token).unwrap();
        let check = |token: &str| verify::verify(token, &header, &keys, &rules, "", 1_300_000_000);
        // The signature is right; the claims have no subject.
        assert_eq!(check(&token), Err(AuthFailure::SubjectUnusable));
        let tampered = token.replacen(".eyJpc3MiOiJqb2Ui", ".eyJpc3MiOiJqb2Vi", 1);
        assert_eq!(check(&tampered), Err(AuthFailure::SignatureWrong));
    }
}

#[test]
fn refusals_contain_no_secret() {
    let auth = hs256();
    let shown = format!("{auth:?}");
    assert!(!shown.contains("secret of these tests"), "{shown}");
    let refusal = AuthFailure::KeysUnavailable.refusal();
    assert_eq!((refusal.status, refusal.retry_after_s), (503, Some(5)));
}

#[tokio::test]
async fn trust_accepts_any_claimed_user_but_requires_one() {
    let auth = Authenticator::trust();
    let found = check(&auth, &Secret::new("anything".into()), "alice").await;
    assert_eq!(found, Ok(Identity { user: "alice".into(), expires_at_s: None, issued_at_s: None }));
    let TokenCheck::Done(found) = auth.check(None, "") else { panic!("not at once") };
    assert_eq!(found, Err(AuthFailure::UserMissing));
}
