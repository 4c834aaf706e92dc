//! The import graph: the paths in every file, resolved to the modules that define them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::slice;

use syn::visit::Visit;
use syn::{Item, UseTree};

use super::source::{is_for_tests, read, rust_files};

/// The path of a module from the root of its crate, by segment. Empty for the root itself.
pub(super) type Module = Vec<String>;

/// Limit of re-exports followed for one path. More would be a cycle.
const ALIASES_MAX: usize = 8;

/// The imports between the modules of one crate, without tests.
pub(super) struct Imports {
    /// Importing module, imported module.
    edges: BTreeSet<(Module, Module)>,
}

#[derive(Default)]
struct File {
    /// Every path in the file, absolute.
    paths: Vec<Module>,
    /// The names that `use` brings into the module, which other modules may import from it.
    aliases: BTreeMap<String, Module>,
    /// Child modules under `#[cfg(test)]`.
    test_modules: Vec<String>,
}

impl Imports {
    /// Reads the crate whose `lib.rs` or `main.rs` is in `folder`.
    pub(super) fn of(folder: &str) -> Self {
        let mut files = BTreeMap::new();
        for path in rust_files(folder) {
            if path.components().any(|part| part.as_os_str() == "bin") {
                continue;
            }
            let module = module_of(&path, folder);
            let syntax = syn::parse_file(&read(&path)).expect("compiles");
            let mut file = File::default();
            Reader { module: &module, file: &mut file }.visit_file(&syntax);
            files.insert(module, file);
        }
        let for_tests: Vec<Module> = files
            .iter()
            .flat_map(|(module, file)| {
                file.test_modules.iter().map(|name| [&module[..], slice::from_ref(name)].concat())
            })
            .collect();
        files.retain(|module, _| !for_tests.iter().any(|test| module.starts_with(test)));
        let mut edges = BTreeSet::new();
        for (from, file) in &files {
            for path in &file.paths {
                if let Some(to) = resolve(&files, path.clone())
                    && to != *from
                {
                    edges.insert((from.clone(), to));
                }
            }
        }
        Self { edges }
    }

    /// The imports among the children of `parent`, each with one example of two files. Imports between
    /// a module and its own parent or children do not count.
    pub(super) fn among_children_of(
        &self,
        parent: &[String],
    ) -> BTreeMap<(String, String), (Module, Module)> {
        let child =
            |module: &Module| module.strip_prefix(parent).and_then(|rest| rest.first()).cloned();
        let mut found = BTreeMap::new();
        for edge @ (from, to) in &self.edges {
            if let (Some(from), Some(to)) = (child(from), child(to))
                && from != to
            {
                found.entry((from, to)).or_insert_with(|| edge.clone());
            }
        }
        found
    }

    /// The imports that form cycles between the children of any module.
    pub(super) fn cycles(&self) -> Vec<String> {
        let parents: BTreeSet<&[String]> = self
            .edges
            .iter()
            .flat_map(|(from, to)| [from, to])
            .flat_map(|module| (0..module.len()).map(|depth| &module[..depth]))
            .collect();
        parents.into_iter().flat_map(|parent| self.cycles_below(parent)).collect()
    }

    fn cycles_below(&self, parent: &[String]) -> Vec<String> {
        let mut edges = self.among_children_of(parent);
        // Removes modules that import none or are imported by none, until only cycles remain.
        loop {
            let from: BTreeSet<String> = edges.keys().map(|(from, _)| from.clone()).collect();
            let to: BTreeSet<String> = edges.keys().map(|(_, to)| to.clone()).collect();
            let before = edges.len();
            edges.retain(|(a, b), _| to.contains(a) && from.contains(b));
            if edges.len() == before {
                break;
            }
        }
        let line = |(from, to): &(Module, Module)| {
            format!("cycle: {} imports {}", from.join("::"), to.join("::"))
        };
        edges.values().map(line).collect()
    }
}

fn module_of(path: &Path, folder: &str) -> Module {
    let inner = path.strip_prefix(folder).expect("below the folder").with_extension("");
    let mut module: Module = inner.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
        module.pop();
    }
    module
}

/// The module that defines `path`, after following re-exports. `None`: in another crate.
fn resolve(files: &BTreeMap<Module, File>, mut path: Module) -> Option<Module> {
    for _ in 0..ALIASES_MAX {
        let depth = (0..=path.len()).rev().find(|depth| files.contains_key(&path[..*depth]))?;
        let (module, rest) = path.split_at(depth);
        match rest.first().and_then(|name| files[module].aliases.get(name)) {
            Some(target) if target != &path => path = [&target[..], &rest[1..]].concat(),
            _ => return (depth > 0).then(|| module.to_vec()),
        }
    }
    None
}

/// Reads one file. Inline modules count as part of their file.
struct Reader<'a> {
    module: &'a Module,
    file: &'a mut File,
}

impl Reader<'_> {
    /// The absolute path if `path` begins with `crate`, `self` or `super`.
    fn absolute(&self, path: &[String]) -> Option<Module> {
        let mut base = match path.first()?.as_str() {
            "crate" => Vec::new(),
            "self" | "super" => self.module.clone(),
            _ => return None,
        };
        let mut rest = if path[0] == "super" { path } else { &path[1..] };
        while let Some("super") = rest.first().map(String::as_str) {
            base.pop();
            rest = &rest[1..];
        }
        base.extend_from_slice(rest);
        Some(base)
    }

    fn take(&mut self, path: &[String], alias: Option<&str>) {
        // Without such a keyword the path begins at another crate or at a child of this module.
        let absolute = self.absolute(path).unwrap_or_else(|| [&self.module[..], path].concat());
        if let Some(alias) = alias {
            self.file.aliases.insert(alias.to_owned(), absolute.clone());
        }
        self.file.paths.push(absolute);
    }

    fn take_use(&mut self, tree: &UseTree, before: &[String]) {
        let with = |name: String| [before, &[name]].concat();
        match tree {
            UseTree::Path(path) => self.take_use(&path.tree, &with(path.ident.to_string())),
            UseTree::Name(name) if name.ident == "self" => {
                self.take(before, before.last().map(String::as_str));
            }
            UseTree::Name(name) => {
                let name = name.ident.to_string();
                self.take(&with(name.clone()), Some(&name));
            }
            UseTree::Rename(rename) => {
                self.take(&with(rename.ident.to_string()), Some(&rename.rename.to_string()));
            }
            UseTree::Glob(_) => self.take(before, None),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.take_use(tree, before);
                }
            }
        }
    }
}

impl Visit<'_> for Reader<'_> {
    fn visit_item(&mut self, item: &Item) {
        let attributes = match item {
            Item::Mod(module) => {
                if is_for_tests(&module.attrs) {
                    self.file.test_modules.push(module.ident.to_string());
                }
                &module.attrs
            }
            Item::Use(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            _ => return syn::visit::visit_item(self, item),
        };
        if !is_for_tests(attributes) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &syn::ItemUse) {
        self.take_use(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &syn::Path) {
        let segments: Module = path.segments.iter().map(|part| part.ident.to_string()).collect();
        if segments.len() > 1 {
            self.take(&segments, None);
        }
        syn::visit::visit_path(self, path);
    }
}

#[test]
fn cycles_are_found_and_reported_once() {
    let name = |text: &str| -> Module { text.split("::").map(str::to_owned).collect() };
    let edge = |from, to| (name(from), name(to));
    let imports = Imports {
        edges: [
            edge("a::x", "b"),
            edge("b::y", "c"),
            edge("c", "a::z"),
            edge("d", "a"),
            edge("a::x", "a"),
            edge("a", "a::z"),
        ]
        .into(),
    };
    assert_eq!(
        imports.cycles(),
        ["cycle: a::x imports b", "cycle: b::y imports c", "cycle: c imports a::z"]
    );
}

#[test]
fn paths_resolve_to_the_module_that_defines_the_name() {
    let mut files: BTreeMap<Module, File> = BTreeMap::new();
    let name = |text: &str| -> Module { text.split("::").map(str::to_owned).collect() };
    for (path, source) in [
        ("a", "mod x; mod y; pub use x::X; #[cfg(test)] mod tests;"),
        ("a::x", "use super::y::{Y, self as other}; pub struct X;"),
        ("a::y", "fn f() { crate::a::X::new(); super::x::g(); std::mem::swap(); }"),
    ] {
        let module = name(path);
        let mut file = File::default();
        Reader { module: &module, file: &mut file }
            .visit_file(&syn::parse_file(source).expect("valid"));
        files.insert(module, file);
    }
    assert_eq!(files[&name("a")].test_modules, ["tests"]);
    let imported = |from: &str| -> BTreeSet<Module> {
        let file = &files[&name(from)];
        file.paths.iter().filter_map(|path| resolve(&files, path.clone())).collect()
    };
    assert!(imported("a::x").contains(&name("a::y")));
    assert!(imported("a::y").contains(&name("a::x")), "X is defined there");
}
