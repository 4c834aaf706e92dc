//! Negotiation of permessage-deflate (RFC 7692 §5, §7.1) from `Sec-WebSocket-Extensions`.

use crate::protocol::deflate::{WINDOW_BITS_MAX, WINDOW_BITS_MIN};
use crate::protocol::upgrade::list;

/// Registered name of the extension (RFC 7692 §8.1).
const NAME: &str = "permessage-deflate";
/// Maximum number of extensions in one request. A request with more is refused.
const OFFERS_MAX: usize = 16;
/// Maximum number of parameters of one extension. permessage-deflate has four.
const PARAMETERS_MAX: usize = 16;

/// Negotiated parameters. Neither side keeps its window between messages. So the server compresses
/// an event once for all recipients, and no connection stores an inflate window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeflateParams {
    /// Window of the server's compressor, as a power of two: 8 to 15.
    pub server_window_bits: u8,
    /// The offer contains `server_max_window_bits`, so the answer must contain it.
    window_bits_named: bool,
}

impl DeflateParams {
    /// Whether the client accepts the largest window, which shared events are compressed with.
    pub fn takes_any_window(self) -> bool {
        self.server_window_bits == WINDOW_BITS_MAX
    }

    /// The value of `Sec-WebSocket-Extensions` in the response.
    ///
    /// For any offer the server may add `server_no_context_takeover` (RFC 7692 §7.1.1.1) and demand
    /// `client_no_context_takeover` (§7.1.1.2). `client_max_window_bits` is not needed: the inflater's
    /// window is the largest.
    pub fn answer(self) -> String {
        let mut value = format!("{NAME}; server_no_context_takeover; client_no_context_takeover");
        if self.window_bits_named {
            // RFC 7692 §7.1.2.1: the server confirms server_max_window_bits with the same or a smaller
            // value.
            value.push_str(&format!("; server_max_window_bits={}", self.server_window_bits));
        }
        value
    }
}

/// The header violates the grammar (RFC 6455 §9.1: the connection MUST fail).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadExtensions;

/// Chooses the first valid offer; offers are in the client's order of preference (RFC 7692 §5.2).
/// Declines an offer with an unknown, repeated or invalid parameter (§7.1). Ignores unknown extensions.
///
/// # Errors
///
/// [`BadExtensions`] if the header is not an extension list (RFC 6455 §9.1).
pub fn negotiate<'a>(
    values: impl Iterator<Item = &'a str>,
) -> Result<Option<DeflateParams>, BadExtensions> {
    let mut chosen = None;
    let mut offers = 0;
    for value in values {
        for offer in list::elements(value) {
            offers += 1;
            if offers > OFFERS_MAX {
                return Err(BadExtensions);
            }
            let accepted = evaluate(offer)?;
            chosen = chosen.or(accepted);
        }
    }
    Ok(chosen)
}

/// Parameters of one offer.
#[derive(Default)]
struct DeflateOffer {
    server_no_context_takeover: bool,
    client_no_context_takeover: bool,
    server_max_window_bits: Option<u8>,
    client_max_window_bits: bool,
    declined: bool,
}

/// The parameters to answer an offer with; `None` if it is declined.
fn evaluate(element: &str) -> Result<Option<DeflateParams>, BadExtensions> {
    let mut parts = list::parts(element, b';');
    let name = parts.next().unwrap_or_default();
    if !list::is_token(name) {
        return Err(BadExtensions);
    }
    let mut offer = DeflateOffer::default();
    for (count, part) in parts.enumerate() {
        if count >= PARAMETERS_MAX {
            return Err(BadExtensions);
        }
        let (key, value) = parameter(part)?;
        offer.add(key, value.as_deref());
    }
    if !name.eq_ignore_ascii_case(NAME) || offer.declined {
        return Ok(None);
    }
    Ok(Some(DeflateParams {
        server_window_bits: offer.server_max_window_bits.unwrap_or(WINDOW_BITS_MAX),
        window_bits_named: offer.server_max_window_bits.is_some(),
    }))
}

impl DeflateOffer {
    fn add(&mut self, key: &str, value: Option<&str>) {
        // RFC 7692 §7.1: an unknown parameter, an invalid value or a repeated name declines the offer.
        let valid = if key.eq_ignore_ascii_case("server_no_context_takeover") {
            !std::mem::replace(&mut self.server_no_context_takeover, true) && value.is_none()
        } else if key.eq_ignore_ascii_case("client_no_context_takeover") {
            !std::mem::replace(&mut self.client_no_context_takeover, true) && value.is_none()
        } else if key.eq_ignore_ascii_case("server_max_window_bits") {
            let bits = value.and_then(window_bits);
            bits.is_some() && self.server_max_window_bits.replace(bits.unwrap_or(0)).is_none()
        } else if key.eq_ignore_ascii_case("client_max_window_bits") {
            // RFC 7692 §7.1.2.2: the value is optional in an offer.
            !std::mem::replace(&mut self.client_max_window_bits, true)
                && value.is_none_or(|bits| window_bits(bits).is_some())
        } else {
            false
        };
        self.declined |= !valid;
    }
}

/// A decimal from 8 to 15 without leading zeros (RFC 7692 §7.1.2).
fn window_bits(value: &str) -> Option<u8> {
    let bits = value.parse().ok()?;
    let plain = value.bytes().all(|b| b.is_ascii_digit()) && !value.starts_with('0');
    (plain && (WINDOW_BITS_MIN..=WINDOW_BITS_MAX).contains(&bits)).then_some(bits)
}

/// `token [ "=" ( token | quoted-string ) ]`. A quoted value must be a token too (RFC 6455 §9.1).
fn parameter(part: &str) -> Result<(&str, Option<std::borrow::Cow<'_, str>>), BadExtensions> {
    let Some((key, value)) = part.split_once('=') else {
        return if list::is_token(part) { Ok((part, None)) } else { Err(BadExtensions) };
    };
    let (key, value) = (key.trim_end_matches([' ', '\t']), value.trim_start_matches([' ', '\t']));
    let value = list::unquoted(value).ok_or(BadExtensions)?;
    if !list::is_token(key) || !list::is_token(&value) {
        return Err(BadExtensions);
    }
    Ok((key, Some(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(offer: &str) -> Result<Option<String>, BadExtensions> {
        negotiate([offer].into_iter()).map(|chosen| chosen.map(DeflateParams::answer))
    }

    const PLAIN: &str =
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

    #[test]
    fn accepted_offers_and_their_answers() {
        for offer in [
            "permessage-deflate",
            "Permessage-Deflate",
            "permessage-deflate; client_max_window_bits",
            "permessage-deflate; client_max_window_bits=10",
            "permessage-deflate; client_max_window_bits=\"10\"",
            "permessage-deflate;server_no_context_takeover;client_no_context_takeover",
            " permessage-deflate ; client_max_window_bits , x-webkit-deflate-frame",
            "x-webkit-deflate-frame, permessage-deflate",
            "permessage-deflate; unknown, permessage-deflate",
            "permessage-deflate; server_max_window_bits=16, permessage-deflate; client_max_window_bits",
            ", permessage-deflate,,",
            "foo; bar=\"a\\b\", permessage-deflate",
        ] {
            assert_eq!(answer(offer), Ok(Some(PLAIN.into())), "{offer}");
        }
        for bits in 8..=15 {
            let offer = format!("permessage-deflate; server_max_window_bits={bits}");
            let expected = format!("{PLAIN}; server_max_window_bits={bits}");
            assert_eq!(answer(&offer), Ok(Some(expected)));
        }
    }

    #[test]
    fn first_valid_offer_is_chosen() {
        let offers = "permessage-deflate; server_max_window_bits=9, permessage-deflate";
        assert_eq!(answer(offers), Ok(Some(format!("{PLAIN}; server_max_window_bits=9"))));
        let chosen = negotiate(["foo", "permessage-deflate"].into_iter());
        assert!(chosen.is_ok_and(|chosen| chosen.is_some_and(DeflateParams::takes_any_window)));
    }

    #[test]
    fn declined_offers() {
        for parameters in [
            "server_no_context_takeover=1",
            "server_no_context_takeover; server_no_context_takeover",
            "client_no_context_takeover=true",
            "client_no_context_takeover; Client_No_Context_Takeover",
            "server_max_window_bits",
            "server_max_window_bits=7",
            "server_max_window_bits=16",
            "server_max_window_bits=08",
            "server_max_window_bits=+9",
            "server_max_window_bits=9; server_max_window_bits=9",
            "server_max_window_bits=999999999999",
            "client_max_window_bits=7",
            "client_max_window_bits=016",
            "client_max_window_bits; client_max_window_bits=9",
            "mux",
        ] {
            assert_eq!(
                answer(&format!("permessage-deflate; {parameters}")),
                Ok(None),
                "{parameters}"
            );
        }
        assert_eq!(answer(""), Ok(None));
    }

    #[test]
    fn invalid_extension_list_fails() {
        for bad in [
            "permessage-deflate; ",
            "permessage-deflate; =1",
            "permessage-deflate; a=",
            "permessage-deflate; a=\"",
            "permessage-deflate; a=\"b",
            "permessage-deflate; a=\"b\"c",
            "permessage-deflate; a=\"b c\"",
            "permessage deflate",
            "(permessage-deflate)",
            "; a",
            "permessage-deflate; a=b=c",
        ] {
            assert_eq!(answer(bad), Err(BadExtensions), "{bad}");
        }
        assert_eq!(answer(&"a,".repeat(OFFERS_MAX + 1)), Err(BadExtensions));
        assert_eq!(answer(&format!("a{}", ";b".repeat(PARAMETERS_MAX + 1))), Err(BadExtensions));
    }
}
