//! Reads the files of the tree.

use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Group, Span, TokenStream, TokenTree};

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

/// The source without comments and literals. Line breaks are kept.
pub(super) fn code_of(source: &str) -> String {
    let mut code = Code { text: String::with_capacity(source.len()), line: 1 };
    code.push_all(source.parse().expect("compiles"));
    code.text
}

struct Code {
    text: String,
    /// The line of the source at the end of `text`, from 1.
    line: usize,
}

impl Code {
    fn push_all(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => self.push(&format!(" {ident}"), ident.span()),
                TokenTree::Punct(punct) => self.push(&punct.to_string(), punct.span()),
                TokenTree::Literal(literal) => self.push(" ", literal.span()),
                TokenTree::Group(group) => self.push_group(&group),
            }
        }
    }

    fn push_group(&mut self, group: &Group) {
        let (open, close) = match group.delimiter() {
            Delimiter::Parenthesis => ("(", ")"),
            Delimiter::Brace => ("{", "}"),
            Delimiter::Bracket if is_doc(group) => {
                // The lexer turns a doc comment into `#[doc = "…"]` or `#![doc = "…"]`.
                let attribute = self.text.trim_end_matches('!').trim_end_matches('#').len();
                return self.text.truncate(attribute);
            }
            Delimiter::Bracket => ("[", "]"),
            Delimiter::None => ("", ""),
        };
        self.push(open, group.span_open());
        self.push_all(group.stream());
        self.push(close, group.span_close());
    }

    fn push(&mut self, text: &str, span: Span) {
        while self.line < span.start().line {
            self.text.push('\n');
            self.line += 1;
        }
        let after_word = self.text.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        self.text.push_str(if after_word { text } else { text.trim_start() });
    }
}

fn is_doc(attribute: &Group) -> bool {
    let first = attribute.stream().into_iter().next();
    matches!(first, Some(TokenTree::Ident(name)) if name == "doc")
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
fn comments_and_literals_are_removed() {
    let source = r##"use crate::a; // crate::no
/* crate::no /* nested */ crate::no */ fn f<'a>(x: &'a str) -> char { '"' }
/// crate::no
const S: &str = "crate::no \" crate::no"; const R: &str = r#"crate::no " "#;
use crate::b; #[cfg(test)] mod tests { use crate::c; }"##;
    let code = code_of(source);
    assert_eq!(code.matches("crate::").count(), 3, "{code}");
    assert!(!code.contains("no"), "{code}");
    assert_eq!(without_tests(&code).matches("crate::").count(), 2, "{code}");
    assert_eq!(code.lines().count(), source.lines().count(), "{code}");
    assert_eq!(code.lines().nth(2), Some(""), "a comment is no code");
}
