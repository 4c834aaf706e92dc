# shellcheck shell=bash
# Sourced by scripts of this folder: starts a broker on the client's core, unless KAFKA_BROKERS names one.

# The broker runs on the client's core. With the small heap of the tests, a young collection of 10 to
# 40 ms runs every half second.
export KAFKA_HEAP_OPTS=${KAFKA_HEAP_OPTS:--Xms1g -Xmx1g -Xmn512m}
start_kafka() {
  local port=$((20000 + RANDOM % 5000 * 2)) deadline=$((SECONDS + 90))
  kafka_dir=$(mktemp -d)
  setpriv --pdeathsig KILL -- taskset -c 1 ../tests/services/kafka "$kafka_dir" "$port" $((port + 1)) \
    >"$kafka_dir/log" 2>&1 </dev/null &
  kafka_pid=$!
  trap 'kill -KILL "$kafka_pid" 2>/dev/null || true; rm -rf "$kafka_dir"' EXIT
  until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    kill -0 "$kafka_pid" 2>/dev/null || { tail -20 "$kafka_dir/log"; exit 1; }
    [ "$SECONDS" -lt "$deadline" ] || { echo "Kafka did not answer in 90 s"; exit 1; }
    sleep 0.2
  done
  export KAFKA_BROKERS=127.0.0.1:$port
}
