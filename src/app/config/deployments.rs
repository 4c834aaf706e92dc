//! Tests of the deployment files. The settings in them are loaded as the process would load them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use saphyr::{LoadableYamlNode as _, Yaml};

use super::{Layers, Loaded, Profile, TABLE, load};

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn load_environment(variables: &BTreeMap<String, String>) -> Loaded {
    for name in variables.keys() {
        assert!(TABLE.iter().any(|setting| setting.env() == *name), "{name} is not a setting");
    }
    let layers = Layers::new(Profile::Serve)
        .with_environment(|name| variables.get(name).map(std::convert::Into::into));
    load(layers).unwrap_or_else(|errors| panic!("{errors}"))
}

/// The value at a path of keys. A missing key fails the test.
fn at<'a, 'i>(yaml: &'a Yaml<'i>, path: &[&str]) -> &'a Yaml<'i> {
    path.iter().fold(yaml, |yaml, key| {
        yaml.as_mapping_get(key).unwrap_or_else(|| panic!("no `{key}` of {path:?}"))
    })
}

fn strings(yaml: &Yaml<'_>) -> Vec<String> {
    yaml.as_vec().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
}

fn pairs(yaml: &Yaml<'_>) -> BTreeMap<String, String> {
    let pairs = yaml.as_mapping().unwrap().iter();
    pairs.map(|(k, v)| (k.as_str().unwrap().to_owned(), v.as_str().unwrap().to_owned())).collect()
}

#[test]
fn compose_file_starts_a_valid_node_with_what_io_uring_needs() {
    let documents = Yaml::load_from_str(&read("compose.yaml")).unwrap();
    let services = at(&documents[0], &["services"]);
    let delivery = at(services, &["delivery"]);
    let loaded = load_environment(&pairs(at(delivery, &["environment"])));

    // Each back end in the settings is a service of the file, on the port it listens on.
    let settings = &loaded.settings;
    for peer in settings.kafka_brokers.iter().chain(&settings.redis_addr) {
        let (host, _) = peer.as_str().split_once(':').unwrap();
        assert!(services.as_mapping_get(host).is_some(), "{host} is not a service");
    }
    let kafka = pairs(at(services, &["kafka", "environment"]));
    assert!(kafka["KAFKA_ADVERTISED_LISTENERS"].contains(settings.kafka_brokers[0].as_str()));
    for topic in &settings.kafka_topics {
        let script = strings(at(services, &["topics", "command"])).concat();
        assert!(script.contains(topic.as_str()), "{topic} is not created");
    }

    let security = strings(at(delivery, &["security_opt"]));
    let profile = security.iter().find_map(|option| option.strip_prefix("seccomp=")).unwrap();
    assert!(repository().join(profile).is_file(), "{profile}");
    assert_eq!(strings(at(delivery, &["cap_drop"])), ["ALL"]);
    for port in strings(at(delivery, &["ports"])) {
        assert!(
            port.starts_with("127.0.0.1:"),
            "{port}: must be on loopback, because every client is trusted"
        );
    }
    // The grace period is longer than the time the process may take to stop.
    let grace = at(delivery, &["stop_grace_period"]).as_str().unwrap().trim_end_matches('s');
    let stop_time = settings.drain_delay + settings.drain_period + settings.stop_timeout;
    assert!(grace.parse::<u64>().unwrap() > stop_time.as_secs(), "{stop_time:?}");
}

#[test]
fn kafka_version_is_that_of_the_tests() {
    let pom = read("tests/services/pom.xml");
    let version = pom.split("<kafka.version>").nth(1).unwrap().split('<').next().unwrap();
    let compose = read("compose.yaml");
    let images =
        compose.lines().filter_map(|line| line.trim().strip_prefix("image: apache/kafka:"));
    assert_eq!(images.collect::<Vec<_>>(), [version, version]);
}

#[test]
fn seccomp_profile_allows_io_uring_and_denies_calls_it_does_not_list() {
    let profile: serde_json::Value = serde_json::from_str(&read("deploy/seccomp.json")).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    let groups = profile["syscalls"].as_array().unwrap();
    let names = |action: &str| -> Vec<&str> {
        let groups = groups.iter().filter(|group| group["action"] == action);
        groups.flat_map(|g| g["names"].as_array().unwrap()).map(|n| n.as_str().unwrap()).collect()
    };
    let allowed = names("SCMP_ACT_ALLOW");
    for name in ["io_uring_setup", "io_uring_enter", "io_uring_register", "execve", "futex"] {
        assert!(allowed.contains(&name), "{name}");
    }
    // Calls that an attacker would use and Delivery does not.
    for name in
        ["ptrace", "mount", "unshare", "setns", "bpf", "keyctl", "init_module", "userfaultfd"]
    {
        assert!(!allowed.contains(&name), "{name}");
    }
    for group in groups {
        assert!(group["comment"].as_str().is_some_and(|text| !text.is_empty()), "{group}");
    }
    let mut unique = allowed.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), allowed.len(), "a name is listed twice");
}

#[test]
fn image_is_built_from_existing_files_and_does_not_run_as_root() {
    let file = read("Dockerfile").replace("\\\n", " ");
    let lines: Vec<&str> = file.lines().filter(|line| !line.starts_with('#')).collect();
    let ignored = read(".dockerignore");
    for line in lines.iter().filter(|line| line.starts_with("COPY ") && !line.contains("--from")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        for source in &words[1..words.len() - 1] {
            assert!(repository().join(source).exists(), "{source}");
            assert!(ignored.lines().any(|rule| rule == format!("!{source}")), "{source}");
        }
    }
    let stages = lines.iter().filter(|line| line.starts_with("FROM ")).count();
    assert_eq!(stages, 2);
    let user = lines.iter().rev().find_map(|line| line.strip_prefix("USER ")).unwrap();
    assert!(user.split(':').all(|id| id.parse::<u32>().unwrap() > 0), "{user}");
    let rust = file.split("FROM rust:").nth(1).unwrap().split('-').next().unwrap();
    let (manifest, minor) = (read("Cargo.toml"), |v: &str| v.split('.').nth(1).unwrap().to_owned());
    let wanted = manifest.split("rust-version = \"").nth(1).unwrap().split('"').next().unwrap();
    assert!(minor(rust).parse::<u32>().unwrap() >= minor(wanted).parse().unwrap());
}

#[test]
fn systemd_unit_sets_only_settings_and_has_a_stop_timeout() {
    let unit = read("deploy/delivery.service");
    let values = |key: &str| -> Vec<String> {
        let prefix = format!("{key}=");
        unit.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect()
    };
    for variable in values("Environment") {
        let (name, _) = variable.split_once('=').unwrap();
        assert!(TABLE.iter().any(|setting| setting.env() == name), "{name}");
    }
    // Longer than the time the process may take to stop with the settings of the unit and defaults.
    let environment: BTreeMap<_, _> = values("Environment")
        .iter()
        .filter_map(|variable| variable.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .chain([("KAFKA_BROKERS", "kafka:9092"), ("AUTH_MODE", "trust")].map(
            // Settings without a usable default, which are in the files that the unit names.
            |(name, value)| (name.to_owned(), value.to_owned()),
        ))
        .collect();
    let settings = load_environment(&environment).settings;
    let stop_time = settings.drain_delay + settings.drain_period + settings.stop_timeout;
    let [given] = &values("TimeoutStopSec")[..] else { panic!("one TimeoutStopSec") };
    assert!(given.parse::<u64>().unwrap() > stop_time.as_secs(), "{stop_time:?}");
    assert!(values("SystemCallFilter").iter().any(|filter| filter == "@system-service"));
    assert!(Path::new(values("ExecStart")[0].split(' ').next().unwrap()).is_absolute());
}
