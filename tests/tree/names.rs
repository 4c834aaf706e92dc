//! One name per thing: no two types of `src` share a name.

use std::collections::BTreeMap;
use std::path::Path;

use syn::{Attribute, Item, Visibility};

use super::source::{is_for_tests, read, report, rust_files};

/// Names that several visible types may share, with the reason.
const SHARED: [(&str, &str); 0] = [];

/// Names that say too little to occur twice, even for private types.
const UNIQUE: [&str; 10] =
    ["Job", "Origin", "Phase", "Record", "Shared", "Stage", "Step", "Told", "Wait", "Written"];

struct Definition {
    name: String,
    visible: bool,
    path: String,
}

/// The structs, enums, unions, traits and type aliases of one file, without those for tests.
fn definitions(items: &[Item], path: &Path, found: &mut Vec<Definition>) {
    for item in items {
        let (attributes, visibility, name): (&[Attribute], &Visibility, _) = match item {
            Item::Struct(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Enum(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Union(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Trait(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Type(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Mod(module) => {
                if let Some((_, items)) = &module.content
                    && !is_for_tests(&module.attrs)
                {
                    definitions(items, path, found);
                }
                continue;
            }
            _ => continue,
        };
        if !is_for_tests(attributes) {
            found.push(Definition {
                name: name.to_string(),
                visible: !matches!(visibility, Visibility::Inherited),
                path: path.display().to_string(),
            });
        }
    }
}

#[test]
fn no_two_types_share_a_name() {
    let mut found = Vec::new();
    for path in rust_files("src") {
        if path.file_stem().is_some_and(|stem| stem == "tests" || stem == "testing") {
            continue;
        }
        let file = syn::parse_file(&read(&path)).expect("compiles");
        definitions(&file.items, &path, &mut found);
    }
    let mut by_name: BTreeMap<&str, Vec<&Definition>> = BTreeMap::new();
    for definition in &found {
        by_name.entry(&definition.name).or_default().push(definition);
    }
    let mut findings = Vec::new();
    for (name, definitions) in by_name {
        let visible = definitions.iter().filter(|definition| definition.visible).count();
        let allowed = SHARED.iter().any(|(shared, _)| *shared == name);
        if definitions.len() > 1 && !allowed && (visible > 1 || UNIQUE.contains(&name)) {
            let paths: Vec<_> = definitions.iter().map(|one| one.path.as_str()).collect();
            findings.push(format!("{name}: {}", paths.join(", ")));
        }
    }
    report(&findings);
}
