//! Layers import downwards only, unsafe code stays where it belongs, what is pure stays pure, and
//! nothing is left half done.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::imports::Imports;
use super::source::{code_of, read, report, root, rust_files, without_tests};

/// What each layer may import of ours (the map in `src/lib.rs`).
const LAYERS: [(&str, &[&str]); 7] = [
    ("domain", &["domain"]),
    ("protocol", &["protocol", "domain"]),
    ("handoff", &["handoff", "domain"]),
    ("uring", &["uring", "domain"]),
    ("reactor", &["reactor", "uring", "handoff", "protocol", "domain"]),
    ("service", &["service", "handoff", "protocol", "domain"]),
    ("app", &["app", "service", "reactor", "uring", "handoff", "protocol", "domain"]),
];

/// What each floor of the service side may import of the others (`src/service/mod.rs`).
const FLOORS: [(&str, &[&str]); 7] = [
    ("runtime", &[]),
    ("events", &["runtime"]),
    ("backends", &["events", "runtime"]),
    ("members", &["backends", "events", "runtime"]),
    ("routing", &["members", "backends", "events", "runtime"]),
    ("sessions", &["routing", "members", "backends", "events", "runtime"]),
    ("streams", &["routing", "members", "backends", "events", "runtime"]),
];

/// Layers that take time and randomness as arguments and know no runtime, no log and no back end.
const PURE: [&str; 3] = ["domain", "protocol", "handoff"];

/// Words that the pure layers do not use outside their tests.
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

/// Lines of code of one file, its tests and comments not counted.
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

/// The modules of `parent` that import against `allowed`, which names for each what it may import.
fn against(imports: &Imports, parent: &[&str], allowed: &[(&str, &[&str])]) -> Vec<String> {
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
            None => findings.push(format!("{from} is on no floor")),
        }
    }
    findings
}

#[test]
fn layers_and_floors_import_downwards_only() {
    let imports = Imports::of("src");
    let mut findings = against(&imports, &[], &LAYERS);
    findings.extend(against(&imports, &["service"], &FLOORS));
    report(&findings);
}

#[test]
fn no_modules_import_each_other_in_a_circle() {
    let mut findings = Vec::new();
    for folder in ["src", "fuzz/src", "bench/src", "tests/kit/src"] {
        findings.extend(Imports::of(folder).cycles());
    }
    report(&findings);
}

/// The limit that the benchmarks measure against is the kernel's ring without any layer: a program
/// of its own, not a part of ours. Its second file is the rings over many file tables.
const BARE_RING: [&str; 2] = ["bench/src/servers/bare.rs", "bench/src/servers/rings.rs"];

#[test]
fn unsafe_code_is_in_uring_only() {
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
fn every_unsafe_block_says_why_it_holds() {
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
fn pure_layers_take_time_and_chance_as_arguments() {
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
fn files_can_be_read_in_one_sitting() {
    let mut findings = Vec::new();
    for folder in ["src", "tests"] {
        for path in rust_files(folder) {
            if path.starts_with("tests/data") {
                continue; // Tables.
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
fn nothing_is_left_half_done() {
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
