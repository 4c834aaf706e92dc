# shellcheck shell=bash
# The groups of tests/run, which sources this file: one function `group_NAME` for each.
# Each runs under `set -e` with an ERR trap that prints the command that failed.
# shellcheck disable=SC2154 # services_dir is a variable of tests/run.

# --- what the tests need -------------------------------------------------------------------------

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "not root and no sudo: run as root: $*"
  fi
}

apt_updated=
install_packages() {
  command -v apt-get >/dev/null || die "not Debian: install the equivalent of these Debian packages: $*"
  say "installing Debian packages: $*"
  if [ -z "$apt_updated" ]; then as_root apt-get update -qq; apt_updated=1; fi
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# have_or_install COMMAND PACKAGE...: installs the packages if the command is missing.
have_or_install() {
  local command=$1; shift
  command -v "$command" >/dev/null || install_packages "$@"
}

kafka_jars() {
  local want have=$services_dir/kafka/.pom
  want=$(sha256sum tests/services/pom.xml | cut -d' ' -f1)
  if [ "$(cat "$have" 2>/dev/null || true)" = "$want" ]; then return; fi
  have_or_install java default-jre-headless
  have_or_install mvn maven
  say "fetching Apache Kafka (tests/services/pom.xml) into .services/kafka"
  rm -rf "$services_dir/kafka"
  mvn -q -B -f tests/services/pom.xml package >"$services_dir/maven.log" 2>&1 ||
    { tail -20 "$services_dir/maven.log"; die "Maven failed: .services/maven.log"; }
  echo "$want" >"$have"
}

group_setup() {
  command -v cargo >/dev/null || die "cargo is missing: install Rust (https://rustup.rs), then run this again"
  have_or_install cc build-essential
  have_or_install c++ build-essential
  have_or_install make build-essential
  have_or_install pkg-config pkg-config
  pkg-config --exists openssl || install_packages libssl-dev
  [ -n "${REDIS_ADDR:-}" ] || have_or_install redis-server redis-server
  if [ -z "${KAFKA_BROKERS:-}" ]; then
    have_or_install java default-jre-headless
    kafka_jars
  fi
  have_or_install shellcheck shellcheck
  if ! cargo fuzz --version >/dev/null 2>&1; then
    say "installing cargo-fuzz"
    cargo install --quiet --locked cargo-fuzz
  fi
}

# --- Kafka and Redis -----------------------------------------------------------------------------

start_services() {
  if [ -z "${KAFKA_BROKERS:-}" ]; then
    local port controller_port
    port=$(free_port) controller_port=$(free_port)
    say "starting Kafka on 127.0.0.1:$port"
    start_service kafka "$port" tests/services/kafka "$services_dir/run/kafka" "$port" "$controller_port"
    export KAFKA_BROKERS=127.0.0.1:$port
  fi
  if [ -z "${REDIS_ADDR:-}" ]; then
    local port
    port=$(free_port)
    say "starting Redis on 127.0.0.1:$port"
    start_service redis "$port" tests/services/redis "$services_dir/run/redis" "$port"
    export REDIS_ADDR=127.0.0.1:$port
  fi
}

# --- groups --------------------------------------------------------------------------------------

group_checks() {
  cargo fmt --check
  cargo clippy --quiet --all-targets -- -D warnings
  cargo clippy --quiet --bin simulate --features simulation -- -D warnings
  # The benchmarks use public items of the server, and share what is compiled.
  cargo clippy --quiet --manifest-path bench/Cargo.toml --target-dir "${CARGO_TARGET_DIR:-target}" --all-targets -- \
    -D warnings
  RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps
  # Of the planted mutations, which take long to run, at least this.
  local patch
  for patch in tests/mutations/*.patch tests/mutations/*/*.patch; do
    git apply --check "$patch" || die "$patch does not apply: plant the same mistake in the present code"
  done
  shellcheck -ax .ci/run tests/run tests/busy tests/autobahn.sh tests/mutations/run tests/services/{kafka,redis} \
    bench/{run,compare,growth,scale,cluster}
}

group_unit() {
  cargo test --quiet
  CARGO_TARGET_DIR=target/loom cargo test --quiet --release --manifest-path tests/loom/Cargo.toml
}

# ignored_tests FILTER...: one at a time because each loads the machine.
ignored_tests() {
  start_services
  cargo test --quiet --test end_to_end -- --ignored --test-threads=1 --nocapture "$@"
}

group_end_to_end() {
  start_services
  cargo test --quiet --lib kafka::tests::real -- --ignored
  ignored_tests --skip clients:: --skip faults::
}

setup_clients() {
  local into=$services_dir/clients
  mkdir -p "$into"
  have_or_install node nodejs
  have_or_install npm npm
  have_or_install chromium chromium
  have_or_install certutil libnss3-tools
  if ! cmp -s tests/clients/package-lock.json "$into/package-lock.json"; then
    say "installing Node ws into .services/clients"
    cp tests/clients/package.json tests/clients/package-lock.json "$into"
    (cd "$into" && npm ci --silent --no-audit --no-fund) || { rm "$into/package-lock.json"; die "npm failed"; }
  fi
  if ! cmp -s tests/clients/requirements.txt "$into/requirements.txt"; then
    say "installing Python websockets into .services/clients"
    python3 -c 'import ensurepip' 2>/dev/null || install_packages python3-venv
    rm -rf "$into/python"
    python3 -m venv "$into/python"
    "$into/python/bin/pip" install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
    cp tests/clients/requirements.txt "$into"
  fi
}

group_clients() {
  setup_clients
  ignored_tests clients::
}

group_autobahn() { tests/autobahn.sh; }

group_autobahn_tls() { tests/autobahn.sh --tls; }

group_faults() { ignored_tests faults::; }

group_mutations() { tests/mutations/run; }

group_fuzz() {
  local target targets
  targets=$(RUSTC_BOOTSTRAP=1 cargo fuzz list)
  for target in $targets; do
    mkdir -p "fuzz/corpus/$target"
    RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
      -seed=1 -max_total_time="${FUZZ_SECONDS:-20}" -verbosity=0 -print_final_stats=1 \
      >"target/fuzz-$target.log" 2>&1 ||
      { tail -40 "target/fuzz-$target.log"; die "fuzz target $target found something"; }
    say "fuzz $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "target/fuzz-$target.log") executions"
  done
}
