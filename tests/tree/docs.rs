//! Documents that name tests name tests that exist.

use std::collections::BTreeSet;
use std::path::Path;

use super::source::{read, report, root, rust_files};

/// The names of all test functions of the tree.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for folder in ["src", "tests"] {
        for path in rust_files(folder) {
            let source = read(&path);
            for part in source.split("fn ").skip(1) {
                let name: String =
                    part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                names.insert(name);
            }
            // Tests that a macro makes are lines `name: …;` of its call.
            for line in source.lines() {
                let name: String =
                    line.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if !name.is_empty()
                    && line.trim()[name.len()..].starts_with(": ")
                    && line.trim().ends_with(';')
                {
                    names.insert(name);
                }
            }
        }
    }
    names
}

/// The last column of each row of each table of the page: the tests it names in backquotes.
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
