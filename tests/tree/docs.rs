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

/// The test `module::name` of `tests/end_to_end`, from its attributes to its name.
fn end_to_end_test(named: &str) -> Option<String> {
    let (modules, name) = named.rsplit_once("::")?;
    let path = format!("tests/end_to_end/{}.rs", modules.replace("::", "/"));
    let source = root().join(&path).exists().then(|| read(Path::new(&path)))?;
    let (before, _) = source.split_once(&format!("\nfn {name}()"))?;
    let from = before.rfind("\n\n").unwrap_or(0);
    before[from..].contains("#[test]").then(|| before[from..].to_owned())
}

#[test]
fn tests_of_the_whole_are_where_the_page_says_and_marked_if_they_need_kafka() {
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
