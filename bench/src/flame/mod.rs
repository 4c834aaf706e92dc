//! Flame graphs and a table of layers from the output of `perf script`.

mod layers;

use std::collections::BTreeMap;
use std::io;

use inferno::flamegraph::{Options, from_lines};
pub use layers::layers;

/// Samples by stack, outermost frame first; the outermost is the thread's name.
pub type Stacks = BTreeMap<Vec<String>, u64>;

/// Reads the output of `perf script -F comm,ip,sym`: per sample a line that begins with the thread's
/// name, lines with an address and a symbol, innermost first, and an empty line. Samples of the
/// idle loop are left out.
pub fn fold(script: &str) -> Stacks {
    let mut stacks = Stacks::new();
    for sample in script.split("\n\n") {
        let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
        let Some(thread) = lines.next().map(str::trim) else { continue };
        if thread.starts_with("swapper") {
            continue;
        }
        let mut stack: Vec<String> = lines.map(symbol).collect();
        stack.push(thread.to_owned());
        stack.reverse();
        *stacks.entry(stack).or_default() += 1;
    }
    stacks
}

/// Draws a flame graph, as SVG.
///
/// # Errors
/// There are no samples.
pub fn svg(title: &str, stacks: &Stacks) -> io::Result<Vec<u8>> {
    let mut options = Options::default();
    options.title = title.to_owned();
    // A semicolon separates frames; a name contains one in the type of an array.
    let line = |(stack, count): (&Vec<String>, &u64)| {
        let frames: Vec<_> = stack.iter().map(|frame| frame.replace(';', ",")).collect();
        format!("{} {count}", frames.join(";"))
    };
    let lines: Vec<_> = stacks.iter().map(line).collect();
    let mut svg = Vec::new();
    from_lines(&mut options, lines.iter().map(String::as_str), &mut svg)
        .map_err(io::Error::other)?;
    Ok(svg)
}

/// The symbol of one line.
fn symbol(line: &str) -> String {
    let name = line.trim().split_once(' ').map_or("[unknown]", |(_, name)| name.trim());
    let name = name.rsplit_once("+0x").map_or(name, |(name, _)| name);
    // Without the hash and the generic arguments.
    let name = format!("{:#}", rustc_demangle::demangle(name));
    name.split("::h").next().filter(|_| is_hashed(&name)).map_or(name.clone(), str::to_owned)
}

/// Whether a name ends in the hash of the older way to mangle names.
fn is_hashed(name: &str) -> bool {
    name.rsplit_once("::h").is_some_and(|(_, hash)| {
        hash.len() == 16 && hash.bytes().all(|digit| digit.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_folded_outermost_first() {
        let script = "shard-0 \n\t  ffff tcp_sendmsg+0x12\n\t 55 delivery::uring::Ring::enter\n\n\
                      shard-0 \n\t  ffff tcp_sendmsg+0x99\n\t 55 delivery::uring::Ring::enter\n\n\
                      swapper \n\t  ffff default_idle\n\n";
        let stacks = fold(script);
        assert_eq!(stacks.len(), 1);
        let (stack, count) = stacks.first_key_value().unwrap();
        assert_eq!(
            (stack.join(";").as_str(), *count),
            ("shard-0;delivery::uring::Ring::enter;tcp_sendmsg", 2)
        );
    }

    #[test]
    fn width_of_a_frame_is_its_share() {
        let stack = |frames: &[&str]| frames.iter().map(|frame| (*frame).to_owned()).collect();
        let stacks = Stacks::from([(stack(&["shard", "a<b>"]), 3), (stack(&["shard", "c"]), 1)]);
        let svg = String::from_utf8(svg("title", &stacks).unwrap()).unwrap();
        assert!(svg.contains("a&lt;b&gt; (3 samples, 75.00%)"), "{svg}");
        assert!(svg.contains("shard (4 samples, 100.00%)"), "{svg}");
    }

    #[test]
    fn hashes_are_removed() {
        assert_eq!(symbol(" 7f00 a::b::h0123456789abcdef+0x3"), "a::b");
        assert_eq!(symbol(" 7f00 a::hello"), "a::hello");
        assert_eq!(symbol(" 7f00"), "[unknown]");
    }
}
