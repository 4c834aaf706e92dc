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
const FLOORS: [(&str, &[&str]); 7] = [
    ("runtime", &[]),
    ("events", &["runtime"]),
    ("backends", &["events", "runtime"]),
    ("members", &["backends", "events", "runtime"]),
    ("routing", &["members", "backends", "events", "runtime"]),
    ("sessions", &["routing", "members", "backends", "events", "runtime"]),
    ("streams", &["routing", "members", "backends", "events", "runtime"]),
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

fn layer_of(path: &Path) -> Option<&'static str> {
    let name = path.strip_prefix("src").ok()?.components().next()?.as_os_str().to_str()?;
    LAYERS.iter().map(|(layer, _)| *layer).find(|layer| *layer == name)
}

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

#[test]
fn unsafe_code_is_only_in_uring() {
    let mut findings = Vec::new();
    for folder in ["src", "tests", "fuzz", "bench"] {
        for path in rust_files(folder) {
            if path.starts_with("src/uring") || BARE_RING.iter().any(|file| path == Path::new(file))
            {
                continue;
            }
            let code = code_of(&read(&path));
            for word in code.split(|c: char| !c.is_alphanumeric() && c != '_') {
                if word == "unsafe" || word == "unsafe_code" {
                    findings.push(format!("{}: {word}", path.display()));
                }
            }
        }
    }
    report(&findings);
}

#[test]
fn every_unsafe_block_has_a_safety_comment() {
    let mut findings = Vec::new();
    for path in rust_files("src/uring") {
        let source = read(&path);
        let lines: Vec<&str> = source.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            let reason = lines[..number]
                .iter()
                .rev()
                .take(16)
                .take_while(|above| {
                    !above.trim().is_empty() || above.trim_start().starts_with("//")
                })
                .any(|above| above.contains("SAFETY:"));
            if !reason {
                findings.push(format!("{}:{}: no SAFETY comment", path.display(), number + 1));
            }
        }
    }
    report(&findings);
}

#[test]
fn pure_layers_have_no_clock_randomness_or_io() {
    let mut findings = Vec::new();
    for path in rust_files("src") {
        let Some(layer) = layer_of(&path) else { continue };
        if !PURE.contains(&layer) {
            continue;
        }
        let code = code_of(&read(&path));
        for word in IMPURE {
            if without_tests(&code).contains(word) {
                findings.push(format!("{}: {word}", path.display()));
            }
        }
    }
    report(&findings);
}

#[test]
fn files_are_short() {
    let mut findings = Vec::new();
    for folder in ["src", "tests"] {
        for path in rust_files(folder) {
            if path.starts_with("tests/data") {
                continue; // Data tables.
            }
            let code = code_of(&read(&path));
            let lines = without_tests(&code).lines().filter(|line| !line.trim().is_empty()).count();
            if lines > CODE_LINES_MAX {
                findings.push(format!("{}: {lines} lines of code", path.display()));
            }
        }
    }
    report(&findings);
}

#[test]
fn no_work_is_left_unfinished() {
    let words = ["TODO", "FIXME", "XXX", "HACK"];
    let mut findings = Vec::new();
    for folder in ["src", "tests", "fuzz", "bench"] {
        for path in rust_files(folder) {
            if path == Path::new("tests/tree/layers.rs") {
                continue;
            }
            let source = read(&path);
            for (number, line) in source.lines().enumerate() {
                for word in words {
                    if line.split(|c: char| !c.is_alphanumeric()).any(|part| part == word) {
                        findings.push(format!("{}:{}: {word}", path.display(), number + 1));
                    }
                }
            }
        }
    }
    report(&findings);
}
