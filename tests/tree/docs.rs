//! Documents name tests that exist, tests quote every promise, and the table of close codes is complete.

use std::collections::BTreeSet;
use std::path::Path;

use super::source::{read, report, root, rust_files, without_tests};

/// The names of all functions of the tree, test functions included.
fn tests() -> BTreeSet<String> {
    let word = |text: &str| -> String {
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut names = BTreeSet::new();
    for path in ["src", "tests"].into_iter().flat_map(rust_files) {
        let source = read(&path);
        names.extend(source.split("fn ").skip(1).map(word));
        // A macro generates tests from lines `name: …;`.
        let generated = source.lines().map(str::trim).filter(|line| line.ends_with(';'));
        let name = |line: &str| line.split_once(": ").map(|(name, _)| name.to_owned());
        names.extend(generated.filter_map(name).filter(|name| word(name) == *name));
    }
    names
}

/// The tests in backquotes in the last column of each table row, with the line number.
fn named_tests(page: &str) -> Vec<(usize, Vec<&str>)> {
    let rows = page
        .lines()
        .enumerate()
        .filter(|(_, line)| line.starts_with("| ") && !line.starts_with("| ---"));
    rows.map(|(number, line)| {
        let last = line.trim_end_matches(['|', ' ']).rsplit(" | ").next().unwrap_or_default();
        (number + 1, last.split('`').skip(1).step_by(2).collect())
    })
    .collect()
}

/// The text of the test `module::name` of `tests/end_to_end` from its attributes to its name.
fn end_to_end_test(named: &str) -> Option<String> {
    let (modules, name) = named.rsplit_once("::")?;
    let path = format!("tests/end_to_end/{}.rs", modules.replace("::", "/"));
    let source = root().join(&path).exists().then(|| read(Path::new(&path)))?;
    let (before, _) = source.split_once(&format!("\nfn {name}()"))?;
    let from = before.rfind("\n\n").unwrap_or(0);
    before[from..].contains("#[test]").then(|| before[from..].to_owned())
}

#[test]
fn end_to_end_tests_exist_and_are_marked_if_they_need_kafka() {
    let page = read(Path::new("docs/contract.md"));
    let mut findings = Vec::new();
    for (line, named) in named_tests(&page) {
        for name in named.into_iter().filter(|name| name.contains("::")) {
            let Some(test) = end_to_end_test(name) else {
                findings.push(format!("docs/contract.md:{line}: {name} is not in its module"));
                continue;
            };
            let row = page.lines().nth(line - 1).unwrap_or_default();
            if row.contains(&format!("● `{name}`")) != test.contains("#[ignore") {
                findings.push(format!("docs/contract.md:{line}: {name} has the wrong mark"));
            }
        }
    }
    report(&findings);
}

#[test]
fn every_sentence_of_the_contract_names_a_test_that_exists() {
    let page = Path::new("docs/contract.md");
    assert!(root().join(page).exists());
    let tests = tests();
    let page = read(page);
    let mut findings = Vec::new();
    let mut rows = 0;
    for (line, named) in named_tests(&page) {
        rows += 1;
        if named.is_empty() && !page.lines().nth(line - 1).unwrap_or_default().contains("| test |")
        {
            findings.push(format!("docs/contract.md:{line} names no test"));
        }
        for name in named {
            if !tests.contains(name.rsplit("::").next().unwrap_or(name)) {
                findings.push(format!("docs/contract.md:{line}: no test {name}"));
            }
        }
    }
    assert!(rows > 40, "only {rows} rows");
    report(&findings);
}

/// Begins a comment that quotes a promise of `docs/guarantees.md`.
const QUOTE: &str = "Promise: “";

/// Each quote with its place. A test must follow it directly.
fn quotes() -> Vec<(String, String)> {
    let mut quotes = Vec::new();
    for path in ["src", "tests"].into_iter().flat_map(rust_files) {
        let source = read(&path);
        let lines: Vec<_> = source.lines().collect();
        for (number, line) in lines.iter().enumerate().filter(|(_, line)| line.contains(QUOTE)) {
            let Some(quote) = line.trim().strip_prefix("// ").or(line.trim().strip_prefix("/// "))
            else {
                continue;
            };
            let Some(quote) = quote.strip_prefix(QUOTE).and_then(|quote| quote.strip_suffix('”'))
            else {
                continue;
            };
            let after = &lines[number + 1..lines.len().min(number + 8)];
            let is_test = |line: &str| {
                ["#[test]", "#[tokio::test", "(scene: "].iter().any(|mark| line.contains(mark))
            };
            assert!(after.iter().any(|line| is_test(line)), "no test after {line}");
            quotes.push((format!("{}:{}", path.display(), number + 1), quote.to_owned()));
        }
    }
    quotes
}

#[test]
fn every_promise_is_quoted_by_a_test_and_every_quote_is_a_promise() {
    let page = read(Path::new("docs/guarantees.md"));
    let page = page.split_whitespace().collect::<Vec<_>>().join(" ");
    // The promises are in bold.
    let promises: Vec<_> = page.split("**").skip(1).step_by(2).collect();
    assert!(promises.len() >= 8, "only {promises:?}");
    let quotes = quotes();
    let mut findings = Vec::new();
    for promise in &promises {
        if !quotes.iter().any(|(_, quote)| quote == promise) {
            findings.push(format!("no test quotes “{promise}”"));
        }
    }
    for (place, quote) in &quotes {
        if !promises.contains(&quote.as_str()) {
            findings.push(format!("{place}: not a promise of docs/guarantees.md: “{quote}”"));
        }
    }
    report(&findings);
}

/// The constants of `CloseCode`: name and value.
fn close_codes() -> Vec<(String, String)> {
    let source = read(Path::new("src/domain/close.rs"));
    let constants = source.lines().filter_map(|line| {
        let (name, value) = line.trim().strip_prefix("pub const ")?.split_once(": Self = Self(")?;
        Some((name.to_owned(), value.trim_end_matches(");").to_owned()))
    });
    constants.collect()
}

/// Every `Close::new(CloseCode::NAME, "reason")` of the program: name and reason.
fn closes() -> Vec<(String, String)> {
    let mut closes = Vec::new();
    for path in rust_files("src") {
        let source = read(&path);
        for call in without_tests(&source).split("CloseCode::").skip(1) {
            let Some((name, rest)) = call.split_once(',') else { continue };
            let reason = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'));
            if let Some((reason, _)) = reason
                && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
            {
                closes.push((name.to_owned(), reason.to_owned()));
            }
        }
    }
    closes
}

#[test]
fn every_close_code_and_fixed_reason_is_in_the_table_for_clients() {
    let page = read(Path::new("docs/guarantees.md"));
    let rows: Vec<(&str, &str)> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" | "))
        .filter(|(code, _)| code.len() == 4 && code.bytes().all(|b| b.is_ascii_digit()))
        .map(|(code, rest)| (code, rest.split(" |").next().unwrap_or_default()))
        .collect();
    let codes = close_codes();
    assert!(codes.len() >= 13, "{codes:?}");
    let mut findings = Vec::new();
    for (name, code) in &codes {
        if !rows.iter().any(|(row, _)| row == code) {
            findings.push(format!("{code} ({name}) is not in the table"));
        }
    }
    for (row, _) in &rows {
        if !codes.iter().any(|(_, code)| code == row) {
            findings.push(format!("no such close code: {row}"));
        }
    }
    let closes = closes();
    assert!(closes.len() >= 8, "{closes:?}");
    for (name, reason) in &closes {
        let code = codes.iter().find(|(known, _)| known == name).map(|(_, code)| code.as_str());
        let Some((row, reasons)) = rows.iter().find(|(row, _)| Some(*row) == code) else {
            findings.push(format!("{name} “{reason}” has no row"));
            continue;
        };
        // A row without fixed reasons describes them instead.
        let listed: Vec<_> = reasons.split('`').skip(1).step_by(2).collect();
        if !listed.is_empty()
            && !listed
                .iter()
                .any(|known| reason.starts_with(known.split(" N ").next().unwrap_or(known)))
        {
            findings.push(format!("{row}: the reason “{reason}” is not among {listed:?}"));
        }
    }
    report(&findings);
}

/// The parts of the section “No circle” of `docs/queues.md`, from the one that may wait for all others downwards. Those
/// of one line do not wait for each other.
fn parts_in_order(page: &str) -> Vec<Vec<&str>> {
    let (_, section) = page.split_once("\n## No circle\n").expect("the section");
    let section = section.split("\n## ").next().unwrap_or_default();
    let number = |line: &str| line.split_once(". ").is_some_and(|(it, _)| it.parse::<u8>().is_ok());
    let lines = section.lines().filter(|line| number(line));
    lines.map(|line| line.split("**").skip(1).step_by(2).collect()).collect()
}

/// Each queue with its waits: who waits for whom when it is full.
fn waits(page: &str) -> Vec<(&str, Vec<(&str, &str)>)> {
    let mut column = None;
    let mut queues = Vec::new();
    for line in page.lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        if !line.starts_with('|') {
            column = None;
        } else if cells[1] == "queue" {
            column = cells.iter().position(|cell| *cell == "who waits");
            assert!(column.is_some(), "a table without “who waits”: {line}");
        } else if let Some(column) = column
            && !cells[1].starts_with("---")
        {
            let waits = cells[column].split(", ").filter(|wait| *wait != "nobody");
            let waits = waits.map(|wait| wait.split_once(" → ").unwrap_or((wait, "")));
            queues.push((cells[1], waits.collect()));
        }
    }
    queues
}

#[test]
fn no_part_waits_for_one_that_may_wait_for_it() {
    let page = read(Path::new("docs/queues.md"));
    let parts = parts_in_order(&page);
    let place = |part: &str| parts.iter().position(|line| line.contains(&part));
    let queues = waits(&page);
    assert!(queues.len() > 60, "only {} queues", queues.len());
    let mut waiting = BTreeSet::new();
    let mut findings = Vec::new();
    for (queue, waits) in &queues {
        for (who, whom) in waits {
            waiting.insert(*who);
            match (place(who), place(whom)) {
                (Some(who), Some(whom)) if who < whom => {}
                _ => findings.push(format!("“{queue}”: {who} → {whom} is not downwards")),
            }
        }
    }
    report(&findings);
    assert!(waiting.len() >= 6, "only {waiting:?} wait");
}
