//! What the fuzz targets check, without a fuzzer: on the committed seeds, on every input that once
//! was a finding, and on inputs drawn by proptest.

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub)]
mod checks;

use std::path::{Path, PathBuf};

use proptest::prelude::*;

/// Files of a folder under `fuzz/`, in order; none if it does not exist.
fn files(folder: &str, target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder).join(target);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.sort();
    files
}

#[test]
fn seeds_and_regressions_hold() {
    for (target, check) in checks::TARGETS {
        let seeds = files("seeds", target);
        assert!(!seeds.is_empty(), "{target} has no seeds");
        for file in seeds.into_iter().chain(files("regressions", target)) {
            let input = std::fs::read(&file).expect("readable");
            let held = std::panic::catch_unwind(|| check(&input));
            assert!(held.is_ok(), "{}", file.display());
        }
    }
}

#[test]
fn every_seed_and_regression_belongs_to_a_target() {
    for folder in ["seeds", "regressions", "fuzz_targets"] {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder);
        let Ok(entries) = std::fs::read_dir(root) else { continue };
        for entry in entries {
            let path = entry.expect("readable").path();
            let name = path.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
            assert!(checks::TARGETS.iter().any(|(target, _)| *target == name), "{name}");
        }
    }
}

proptest! {
    // A failing input goes to `fuzz/regressions`, not to a file of proptest's own.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn any_input_holds(
        data in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..60),
            proptest::collection::vec(any::<u8>(), 0..2000),
        ],
    ) {
        for (_, check) in checks::TARGETS {
            check(&data);
        }
    }

    /// Scripts of frames under each set of rules: what random bytes hardly ever are.
    #[test]
    fn any_frames_hold(
        rules in 0u8..8,
        cut in any::<u8>(),
        script in proptest::collection::vec(
            (0u8..128, any::<u8>(), 0u8..40, proptest::collection::vec(any::<u8>(), 0..40)),
            0..12,
        ),
    ) {
        let mut data = vec![rules | 8, cut];
        for (shape, first, length, payload) in script {
            data.extend([shape, first, length]);
            data.extend(payload);
        }
        checks::connection::check(&data);
    }
}
