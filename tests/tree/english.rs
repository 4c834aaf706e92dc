//! Plain English: phrases that do not occur in code, tests and documents.

use std::path::Path;

use super::source::{files, read, report};

/// Old words, riddles, and pronouns that exclude some users. Whole words match, also across a line
/// break.
const PHRASES: [&str; 29] = [
    "anew",
    "are away",
    "be away",
    "been away",
    "by and by",
    "get on",
    "gets on",
    "he",
    "hears of",
    "him",
    "himself",
    "his",
    "how far the node is",
    "is away",
    "is told by",
    "is told of",
    "keeps nobody",
    "leave in good order",
    "manieth",
    "of more changes",
    "of which there are",
    "see the module",
    "unless news",
    "unless there are news",
    "was away",
    "were away",
    "what is away",
    "which is away",
    "who asks",
];

/// Text files of the tree, by the end of their names.
const KINDS: [&str; 9] = ["rs", "md", "sh", "toml", "yaml", "html", "service", "conf", "run"];

const FOLDERS: [&str; 7] =
    ["src", "tests", "docs", "deploy", "fuzz/src", "fuzz/fuzz_targets", "bench/src"];

const FILES: [&str; 8] = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "Cargo.toml",
    "Dockerfile",
    "compose.yaml",
    "bench/README.md",
    "fuzz/README.md",
];

/// A line without the marks of a comment or a string.
fn bare(line: &str) -> String {
    let line = line.trim().trim_start_matches(['/', '!', '#', '*', '"']).trim_end_matches('\\');
    line.trim().to_lowercase().replace('_', " ")
}

/// The phrases that begin on the first of the lines.
fn phrases<'a>(lines: &'a [String]) -> impl Iterator<Item = &'static str> + 'a {
    let first = lines[0].len();
    let text = lines.join(" ");
    let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '\'');
    PHRASES.into_iter().filter(move |phrase| {
        text.match_indices(phrase).any(|(at, _)| {
            at < first
                && !word(text[..at].chars().next_back())
                && !word(text[at + phrase.len()..].chars().next())
        })
    })
}

#[test]
fn texts_are_plain_english() {
    let mut paths: Vec<_> = FOLDERS.iter().flat_map(|folder| files(folder, &KINDS)).collect();
    paths.extend(FILES.iter().map(|file| Path::new(file).to_owned()));
    let mut findings = Vec::new();
    for path in paths {
        if path == Path::new("tests/tree/english.rs") {
            continue;
        }
        let lines: Vec<String> = read(&path).lines().map(bare).collect();
        for number in 0..lines.len() {
            let next = lines.len().min(number + 2);
            for phrase in phrases(&lines[number..next]) {
                findings.push(format!("{}:{}: “{phrase}”", path.display(), number + 1));
            }
        }
    }
    report(&findings);
}

#[test]
fn phrases_are_found_as_whole_words_across_lines() {
    let lines = |text: &str| -> Vec<String> { text.lines().map(bare).collect() };
    let found = |text| phrases(&lines(text)).collect::<Vec<_>>();
    assert_eq!(found("/// Kafka is\n    /// away for long"), ["is away"]);
    assert!(found("/// the other is\n    /// this always").is_empty());
    assert_eq!(found("// He said"), ["he"]);
}
