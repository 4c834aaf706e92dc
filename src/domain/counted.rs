//! A count with its noun: `1 shard`, `2 shards`.

use std::fmt;

/// A count and its noun. The plural of the noun is formed with an `s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted<T>(pub T, pub &'static str);

impl<T: fmt::Display + PartialEq + From<u8>> fmt::Display for Counted<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(count, thing) = self;
        let ending = if *count == T::from(1) { "" } else { "s" };
        write!(out, "{count} {thing}{ending}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular_and_everything_else_is_not() {
        let words = [0, 1, 2, 21].map(|count| Counted(count, "shard").to_string());
        assert_eq!(words, ["0 shards", "1 shard", "2 shards", "21 shards"]);
        assert_eq!(Counted(1_usize, "service thread").to_string(), "1 service thread");
    }
}
