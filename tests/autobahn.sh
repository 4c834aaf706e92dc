#!/usr/bin/env bash
# Runs the Autobahn test suite (PyPI: autobahntestsuite, fuzzing client, 517 cases) against /echo.
#
#   tests/autobahn.sh                    starts `delivery dev` and runs all cases against it
#   tests/autobahn.sh --tls              the same over wss://, with a certificate of its own
#   tests/autobahn.sh URL [CASES...]     uses a running server, e.g. ws://127.0.0.1:8083/echo '1.*' 7.1.1
#   tests/autobahn.sh --setup            only installs the suite into .services/autobahn
#
# Prints a line for each case that is not OK, then the counts. Reports are in target/autobahn.
# DELIVERY_BIN: the program to start (default: builds it). AUTOBAHN_PYTHON2: a Python 2.7.
#
# Exit status: 0 if no case is failed, unclean or unimplemented, else 1; 2 wrong usage or no server;
# 3 the suite cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

here=$PWD/tests/autobahn
home=$PWD/.services/autobahn
out=$PWD/target/autobahn
limit_s=3600
venv_tool='virtualenv==20.21.1' # the last release series that supports Python 2.7

say() { printf 'autobahn: %s\n' "$*" >&2; }

# --- Python 2.7, required by the suite -----------------------------------------------------------

works() {
  [ -n "${1:-}" ] && [ -x "$1" ] &&
    "$1" -c 'import sys, ssl, zlib; assert sys.version_info[:2] == (2, 7)' 2>/dev/null
}

# Debian 11 is the last Debian with Python 2.7. Its packages are unpacked below .services, not
# installed.
deb=$home/debian
use_debian() {
  export LD_LIBRARY_PATH=$deb/root/usr/lib/x86_64-linux-gnu
  export CPATH=$deb/root/usr/include/python2.7:$deb/root/usr/include
}
fetch_debian() {
  [ -e "$deb/complete" ] && return
  say "no Python 2.7 found: downloading it from Debian 11"
  mkdir -p "$deb/lists/partial" "$deb/cache/archives/partial" "$deb/root"
  local mirror
  # shellcheck disable=SC2016 # apt-get expands it.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v -i security | head -n 1)
  [ -n "$mirror" ] || return 1
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bullseye main" >"$deb/sources.list"
  local options=(-qq -o "Dir::Etc::SourceList=$deb/sources.list" -o Dir::Etc::SourceParts=-
    -o "Dir::State::Lists=$deb/lists" -o "Dir::Cache=$deb/cache" -o APT::Sandbox::User=root
    -o Acquire::Languages=none)
  apt-get "${options[@]}" update >&2 || return 1
  (cd "$deb" && apt-get "${options[@]}" download python2.7 python2.7-minimal python2.7-dev \
    libpython2.7 libpython2.7-minimal libpython2.7-stdlib libpython2.7-dev libssl1.1 libffi7 >&2) || return 1
  local package
  for package in "$deb"/*.deb; do dpkg-deb -x "$package" "$deb/root" || return 1; done
  touch "$deb/complete"
}

find_python() {
  local candidate
  for candidate in "${AUTOBAHN_PYTHON2:-}" "$(command -v python2.7 || true)" \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/2.7.*/bin/python2.7; do
    if works "$candidate"; then echo "$candidate"; return; fi
  done
  fetch_debian || return 1
  use_debian
  works "$deb/root/usr/bin/python2.7" && echo "$deb/root/usr/bin/python2.7"
}

# --- the suite -----------------------------------------------------------------------------------

setup() {
  local want python
  want=$(sha256sum "$here/requirements.txt" | cut -d' ' -f1)
  if [ "$(cat "$home/suite/.installed" 2>/dev/null)" != "$want" ]; then
    mkdir -p "$home"
    python=$(find_python) || { say "Python 2.7 is not installed and cannot be downloaded"; return 3; }
    [ ! -e "$deb/complete" ] || use_debian
    say "installing into $home"
    rm -rf "${home:?}/suite" "${home:?}/boot"
    local pip=("$home/suite/bin/pip" install -q --no-deps --no-build-isolation)
    # shellcheck disable=SC2046 # Two requirements, two words.
    ( python3 -m venv "$home/boot" &&
      env -u LD_LIBRARY_PATH -u CPATH "$home/boot/bin/pip" install -q --disable-pip-version-check "$venv_tool" &&
      "$home/boot/bin/virtualenv" -q --no-periodic-update -p "$python" "$home/suite" &&
      "${pip[@]}" $(grep -E '^(setuptools|incremental)==' "$here/requirements.txt") &&
      "${pip[@]}" -r "$here/requirements.txt" &&
      "$home/suite/bin/python" -c 'import autobahntestsuite.fuzzing'
    ) >"$home/install.log" 2>&1 || { say "installation failed: $home/install.log"; tail -5 "$home/install.log" >&2; return 3; }
    echo "$want" >"$home/suite/.installed"
  fi
  [ ! -e "$deb/complete" ] || use_debian
}

# --- the server ----------------------------------------------------------------------------------

# Processes that this script starts. They are stopped when it exits, for whatever reason.
server="" client=""
stop_all() {
  local pid
  for pid in $client $server; do kill "$pid" 2>/dev/null || true; done
  for pid in $client $server; do wait "$pid" 2>/dev/null || true; done
}
trap stop_all EXIT
trap 'exit 130' INT TERM

# start_server TLS|"": starts `delivery dev` on a free port and sets url.
start_server() {
  local program=${DELIVERY_BIN:-}
  if [ -z "$program" ]; then
    cargo build --quiet --release
    program=target/release/delivery
  fi
  local port; port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  local scheme=ws tls=()
  if [ -n "$1" ]; then
    scheme=wss
    env -u LD_LIBRARY_PATH openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost \
      -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout "$out/tls.key" -out "$out/tls.crt" 2>/dev/null
    tls=(TLS_CERT="$out/tls.crt" TLS_KEY="$out/tls.key")
  fi
  env -u LD_LIBRARY_PATH "${tls[@]}" HTTP_PORT="$port" HTTP_ADDR=127.0.0.1:0 GRPC_ADDR=127.0.0.1:0 MESSAGE_TIMEOUT=1h "$program" dev --no-demo >"$out/server.log" 2>&1 &
  server=$!
  url=$scheme://127.0.0.1:$port/echo
  for _ in $(seq 300); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return; fi
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
  done
  say "the server did not start:"; tail -5 "$out/server.log" >&2
  return 2
}

# --- the run -------------------------------------------------------------------------------------

[ "${1:-}" != --help ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0; }
setup || exit
[ "${1:-}" != --setup ] || { say "ready: $home/suite/bin/wstest"; exit 0; }

rm -rf "$out"; mkdir -p "$out"
url=${1:-}
case $url in
  "") start_server "" || exit ;;
  --tls) start_server tls || exit; shift ;;
  *) shift ;;
esac
if ! [[ $url =~ ^wss?://(127\.[0-9.]+|localhost|\[::1\])(:[0-9]+)?(/|\?|$) ]]; then
  say "not a WebSocket URL on the loopback interface: $url"; exit 2
fi
[ $# -gt 0 ] || set -- '1.*' '2.*' '3.*' '4.*' '5.*' '6.*' '7.*' '9.*' '10.*' '12.*' '13.*'

export PYTHONWARNINGS=ignore # about missing TLS libraries
"$home/suite/bin/python" "$here/cases.py" "$out" "$url" "$@" || { say "no such case: $*"; exit 2; }
status=0
timeout -k 5 "$limit_s" "$home/suite/bin/wstest" -m fuzzingclient -s "$out/spec.json" >"$out/wstest.log" 2>&1 &
client=$!
wait "$client" || status=$?
client=
if grep -m1 '^Connection to .* failed' "$out/wstest.log" >&2 && ! grep -q '^Running test case' "$out/wstest.log"; then exit 2; fi
[ "$status" = 0 ] || say "the fuzzing client exited with status $status (124: timeout after ${limit_s} s): $out/wstest.log"
env -u LD_LIBRARY_PATH python3 "$here/verdict.py" "$out" && [ "$status" = 0 ]
