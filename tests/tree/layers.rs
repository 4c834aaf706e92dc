//! Layers import only lower layers, `unsafe` is only in `uring`, pure layers stay pure, files stay short,
//! and no work is left unfinished.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::imports::Imports;
use super::source::{code_of, read, report, root, rust_files, without_tests};

/// Each layer and the layers that it may import (the map in `src/lib.rs`).
const LAYERS: [(&str, &[&str]); 7] = [
    ("domain", &["domain"]),
    ("protocol", &["protocol", "domain"]),
    ("handoff", &["handoff", "domain"]),
    ("uring", &["uring", "domain"]),
    ("reactor", &["reactor", "uring", "handoff", "protocol", "domain"]),
    ("service", &["service", "handoff", "protocol", "domain"]),
    ("app", &["app", "service", "reactor", "uring", "handoff", "protocol", "domain"]),
];

/// Each floor of the service side and the floors that it may import (`src/service/mod.rs`).
const FLOORS: [(&str, &[&str]); 9] = [
    ("runtime", &[]),
    ("events", &["runtime"]),
    ("tls", &["runtime"]),
    ("backends", &["events", "runtime"]),
    ("members", &["backends", "events", "runtime"]),
    ("cluster", &["members", "backends", "events", "runtime"]),
    ("routing", &["cluster", "members", "backends", "events", "runtime"]),
    ("sessions", &["routing", "cluster", "members", "backends", "events", "runtime"]),
    ("streams", &["routing", "members", "backends", "tls", "events", "runtime"]),
];

/// Layers without a clock, randomness, runtime, log or back end: time and randomness are arguments.
const PURE: [&str; 3] = ["domain", "protocol", "handoff"];

/// Paths that pure layers must not use outside their tests.
const IMPURE: [&str; 12] = [
    "Instant::now",
    "SystemTime::now",
    "rand::",
    "tokio::",
    "tracing::",
    "rdkafka::",
    "redis::",
    "tonic::",
    "io_uring::",
    "std::fs",
    "std::net::Tcp",
    "std::thread::sleep",
];

/// Lines of code per file, without tests and comments.
const CODE_LINES_MAX: usize = 450;

#[test]
fn every_folder_is_a_layer_and_every_layer_is_on_the_map() {
    let map = read(Path::new("src/lib.rs"));
    let mut folders: Vec<String> = fs::read_dir(root().join("src"))
        .expect("readable")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.is_dir())
        .map(|path| path.file_name().expect("named").to_string_lossy().into_owned())
        .filter(|name| name != "bin")
        .collect();
    folders.sort();
    let mut layers: Vec<&str> = LAYERS.iter().map(|(layer, _)| *layer).collect();
    layers.sort_unstable();
    assert_eq!(folders, layers);
    for layer in layers {
        assert!(map.contains(&format!("pub mod {layer};")), "src/lib.rs does not name {layer}");
    }
}

/// The imports among the children of `parent` that `allowed` does not list.
fn violations(imports: &Imports, parent: &[&str], allowed: &[(&str, &[&str])]) -> Vec<String> {
    let parent: Vec<String> = parent.iter().map(|&part| part.to_owned()).collect();
    let allowed: BTreeMap<_, _> = allowed.iter().copied().collect();
    let mut findings = Vec::new();
    for ((from, to), (example_from, example_to)) in imports.among_children_of(&parent) {
        match allowed.get(from.as_str()) {
            Some(lower) if lower.contains(&to.as_str()) => {}
            Some(_) => findings.push(format!(
                "{from} imports {to}: {} imports {}",
                example_from.join("::"),
                example_to.join("::")
            )),
            None => findings.push(format!("{from} has no floor")),
        }
    }
    findings
}

#[test]
fn layers_and_floors_import_downwards_only() {
    let imports = Imports::of("src");
    let mut findings = violations(&imports, &[], &LAYERS);
    findings.extend(violations(&imports, &["service"], &FLOORS));
    report(&findings);
}

#[test]
fn modules_do_not_import_each_other_in_a_cycle() {
    let mut findings = Vec::new();
    for folder in ["src", "fuzz/src", "bench/src", "tests/kit/src"] {
        findings.extend(Imports::of(folder).cycles());
    }
    report(&findings);
}

/// The baseline of the benchmarks: a server on the bare ring, a program of its own. The second file
/// spreads it over many rings and file tables.
const BARE_RING: [&str; 2] = ["bench/src/servers/bare.rs", "bench/src/servers/rings.rs"];

/// Fails with every finding of `find` in the Rust files below `folders`, given the path and the source.
fn check(folders: &[&str], find: impl Fn(&Path, &str) -> Vec<String>) {
    let findings = folders.iter().flat_map(|folder| rust_files(folder)).flat_map(|path| {
        let found = find(&path, &read(&path));
        found.into_iter().map(move |finding| format!("{}: {finding}", path.display()))
    });
    report(&findings.collect::<Vec<_>>());
}

/// The words of a text that are among `wanted`.
fn words(text: &str, wanted: &[&str]) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| wanted.contains(word)).map(str::to_owned).collect()
}

#[test]
fn unsafe_code_is_only_in_uring() {
    check(&["src", "tests", "fuzz", "bench"], |path, source| {
        let allowed = path.starts_with("src/uring") || BARE_RING.map(Path::new).contains(&path);
        if allowed { Vec::new() } else { words(&code_of(source), &["unsafe", "unsafe_code"]) }
    });
}

#[test]
fn every_unsafe_block_has_a_safety_comment() {
    check(&["src/uring"], |_, source| {
        let lines: Vec<&str> = source.lines().collect();
        let has_reason = |number: usize| {
            let above = lines[..number].iter().rev().take(16);
            let mut block = above.take_while(|line| !line.trim().is_empty());
            block.any(|line| line.contains("SAFETY:"))
        };
        let is_unsafe = |line: &str| {
            let code = line.split("//").next().unwrap_or_default();
            code.contains("unsafe {") || code.contains("unsafe impl")
        };
        (0..lines.len())
            .filter(|number| is_unsafe(lines[*number]) && !has_reason(*number))
            .map(|number| format!("line {}: no SAFETY comment", number + 1))
            .collect()
    });
}

#[test]
fn pure_layers_have_no_clock_randomness_or_io() {
    check(&PURE.map(|layer| format!("src/{layer}")).each_ref().map(String::as_str), |_, source| {
        let code = code_of(source);
        let used = IMPURE.iter().filter(|path| without_tests(&code).contains(**path));
        used.map(|path| (*path).to_owned()).collect()
    });
}

#[test]
fn files_are_short() {
    check(&["src", "tests"], |path, source| {
        let code = code_of(source);
        let lines = without_tests(&code).lines().filter(|line| !line.trim().is_empty()).count();
        let is_data = path.starts_with("tests/data");
        if is_data || lines <= CODE_LINES_MAX { Vec::new() } else { vec![format!("{lines} lines")] }
    });
}

#[test]
fn no_work_is_left_unfinished() {
    check(&["src", "tests", "fuzz", "bench"], |path, source| {
        match path.ends_with("tree/layers.rs") {
            true => Vec::new(),
            false => words(source, &["TODO", "FIXME", "XXX", "HACK"]),
        }
    });
}
