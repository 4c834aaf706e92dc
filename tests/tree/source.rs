//! Reads the files of the tree.

use std::fs;
use std::path::{Path, PathBuf};

pub(super) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below `folder`, path relative to the package.
pub(super) fn rust_files(folder: &str) -> Vec<PathBuf> {
    files(folder, &["rs"])
}

/// Every file below `folder` whose name ends in one of `kinds` after its last dot, or is one.
pub(super) fn files(folder: &str, kinds: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    folders.push(path);
                }
            } else if kinds.contains(&kind_of(&path)) {
                found.push(path.strip_prefix(root()).expect("below the root").to_path_buf());
            }
        }
    }
    found.sort();
    assert!(!found.is_empty() || !root().join(folder).exists(), "{folder} holds none of {kinds:?}");
    found
}

fn kind_of(path: &Path) -> &str {
    let name = path.file_name().and_then(|name| name.to_str()).expect("text");
    name.rsplit('.').next().unwrap_or(name)
}

pub(super) fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).expect("readable")
}

/// The source without comments, strings and characters. Line breaks are kept.
pub(super) fn code_of(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => line_end(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => block_comment_end(bytes, at),
            b'r' if raw_string_hashes(bytes, at).is_some() => {
                let hashes = raw_string_hashes(bytes, at).expect("just seen");
                let close = format!("\"{}", "#".repeat(hashes));
                let body = at + hashes + 2;
                source[body..].find(&close).map_or(bytes.len(), |n| body + n + close.len())
            }
            b'"' => quoted_end(bytes, at, b'"'),
            b'\'' if is_char_literal(bytes, at) => quoted_end(bytes, at, b'\''),
            byte => {
                code.push(if byte.is_ascii() { byte as char } else { '?' });
                at += 1;
                continue;
            }
        };
        code.extend(bytes[at..end].iter().filter(|byte| **byte == b'\n').map(|_| '\n'));
        code.push(' ');
        at = end;
    }
    code
}

fn line_end(bytes: &[u8], from: usize) -> usize {
    bytes[from..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |n| from + n)
}

fn block_comment_end(bytes: &[u8], from: usize) -> usize {
    let mut depth = 0;
    let mut at = from;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// The number of hashes of `r"`, `r#"`, …; `None` if no raw string starts at `at`.
fn raw_string_hashes(bytes: &[u8], at: usize) -> Option<usize> {
    let word_before = at > 0
        && (bytes[at - 1].is_ascii_alphanumeric() && bytes[at - 1] != b'b'
            || bytes[at - 1] == b'_');
    let hashes = bytes[at + 1..].iter().take_while(|byte| **byte == b'#').count();
    (!word_before && bytes.get(at + 1 + hashes) == Some(&b'"')).then_some(hashes)
}

fn quoted_end(bytes: &[u8], from: usize, quote: u8) -> usize {
    let mut at = from + 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// Distinguishes `'x'` and `'\n'` from the lifetime `'x`.
fn is_char_literal(bytes: &[u8], at: usize) -> bool {
    match bytes.get(at + 1) {
        Some(b'\\') => true,
        Some(first) => {
            let width = match first {
                0x00..=0x7f => 1,
                0x80..=0xdf => 2,
                0xe0..=0xef => 3,
                _ => 4,
            };
            bytes.get(at + 1 + width) == Some(&b'\'')
        }
        None => false,
    }
}

/// The part of a file before its tests.
pub(super) fn without_tests(code: &str) -> &str {
    code.find("#[cfg(test)]").map_or(code, |tests| &code[..tests])
}

/// True for `#[cfg(test)]`.
pub(super) fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"))
    })
}

/// Fails with every finding at once.
pub(super) fn report(findings: &[String]) {
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

#[test]
fn comments_and_strings_are_removed_and_lifetimes_kept() {
    let source = r##"use crate::a; // crate::no
/* crate::no /* nested */ crate::no */ fn f<'a>(x: &'a str) -> char { '"' }
const S: &str = "crate::no \" crate::no"; const R: &str = r#"crate::no " "#;
use crate::b; #[cfg(test)] mod tests { use crate::c; }"##;
    let code = code_of(source);
    assert_eq!(code.matches("crate::").count(), 3);
    assert!(!code.contains("no"));
    assert_eq!(without_tests(&code).matches("crate::").count(), 2);
    assert_eq!(code.lines().count(), source.lines().count());
}
