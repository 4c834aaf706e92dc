//! One name per thing: no two types of `src` share a name.

use std::collections::BTreeMap;
use std::path::Path;

use syn::{Item, Visibility};

use super::source::{is_for_tests, read, report, rust_files};

/// Names that say too little to occur twice, even for private types.
const UNIQUE: [&str; 10] =
    ["Job", "Origin", "Phase", "Record", "Shared", "Stage", "Step", "Told", "Wait", "Written"];

/// For each name the files that define it, and whether others see that definition.
type Definitions = BTreeMap<String, Vec<(String, bool)>>;

/// Adds the structs, enums, traits and type aliases of one file, without those for tests.
fn add_definitions(items: &[Item], path: &Path, found: &mut Definitions) {
    for item in items {
        let (attributes, visibility, name) = match item {
            Item::Struct(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Enum(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Trait(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Type(item) => (&item.attrs, &item.vis, &item.ident),
            Item::Mod(module) => {
                if let (Some((_, items)), false) = (&module.content, is_for_tests(&module.attrs)) {
                    add_definitions(items, path, found);
                }
                continue;
            }
            _ => continue,
        };
        if !is_for_tests(attributes) {
            let visible = !matches!(visibility, Visibility::Inherited);
            found.entry(name.to_string()).or_default().push((path.display().to_string(), visible));
        }
    }
}

#[test]
fn no_two_types_share_a_name() {
    let mut found = Definitions::new();
    for path in rust_files("src") {
        if !path.file_stem().is_some_and(|stem| stem == "tests" || stem == "testing") {
            let file = syn::parse_file(&read(&path)).expect("compiles");
            add_definitions(&file.items, &path, &mut found);
        }
    }
    found.retain(|name, definitions| {
        let visible = definitions.iter().filter(|(_, visible)| *visible).count();
        visible > 1 || definitions.len() > 1 && UNIQUE.contains(&name.as_str())
    });
    report(&found.iter().map(|(name, paths)| format!("{name}: {paths:?}")).collect::<Vec<_>>());
}
