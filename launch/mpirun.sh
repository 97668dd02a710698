#!/usr/bin/env bash
# Trains under mpirun and starts again after a lost rank, from the newest complete checkpoint.
set -uo pipefail

usage() {
  cat <<'USAGE'
usage: launch/mpirun.sh [-n RANKS] [--hostfile FILE] [--mpirun "OPTIONS"] CONFIG [train options]

Runs `mpirun … switchyard train CONFIG --resume auto …` until it is done. Exit code 75 (a lost rank, a
collective past its deadline) and ranks ended by a signal (out of memory, a lost machine) are answered by
another start, from the newest complete checkpoint; any other exit code ends the script: look at the error.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 to this script save a checkpoint and end it with exit code 75.

environment:
  SWITCHYARD              the program [default: switchyard on PATH, else target/release/switchyard]
  SWITCHYARD_RESTARTS     starts without a new checkpoint in between before giving up [default: 5]
  SWITCHYARD_BACKOFF_S    first wait before a start, doubled each time up to 300 s [default: 5]

examples:
  launch/mpirun.sh -n 4 --mpirun --oversubscribe configs/quickstart.toml \
    --set parallel.expert_parallel_size=4 --set data.micro_batch_rows=8
  launch/mpirun.sh -n 16 --hostfile hosts --mpirun "--map-by ppr:8:node" configs/switch-base-8-c4.toml
USAGE
}

ranks= hostfile= extra=
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    -n) ranks="${2:?-n needs a number}"; shift 2 ;;
    --hostfile) hostfile="${2:?--hostfile needs a file}"; shift 2 ;;
    --mpirun) extra="${2?--mpirun needs options}"; shift 2 ;;
    -*) echo "error: unknown option $1 before CONFIG; see --help" >&2; exit 1 ;;
    *) break ;;
  esac
done
[ $# -ge 1 ] || { usage >&2; exit 1; }

program="${SWITCHYARD:-$(command -v switchyard || echo "$(dirname "$0")/../target/release/switchyard")}"
if ! command -v "$program" >/dev/null; then
  echo "error: $program is not there; build it with \`cargo build --release --features switchyard-cli/mpi\` or set SWITCHYARD" >&2
  exit 1
fi

command=(mpirun)
[ -n "$ranks" ] && command+=(-n "$ranks")
[ -n "$hostfile" ] && command+=(--hostfile "$hostfile")
# Options are words: they are meant to split.
# shellcheck disable=SC2206
[ -n "$extra" ] && command+=($extra)
command+=("$program" train "$@" --resume auto)

# Where the run keeps its checkpoints, to tell progress from a crash that repeats.
run_dir= sets=()
for ((i = 2; i <= $#; i++)); do
  next=$((i + 1))
  case "${!i}" in
    --run-dir) run_dir="${!next:-}" ;;
    --run-dir=*) run_dir="${!i#*=}" ;;
    --set) sets+=(--set "${!next:-}") ;;
    --set=*) sets+=("${!i}") ;;
  esac
done
if [ -z "$run_dir" ]; then
  # Says what is wrong with the experiment, once and before any rank starts.
  checked="$("$program" check "$1" "${sets[@]}")" || exit 1
  run_dir="runs/$(awk '$1 == "run" { print $2; exit }' <<<"$checked")"
fi
newest() { ls "$run_dir/checkpoints" 2>/dev/null | grep '^step-' | sort -V | tail -n 1; }

asked_to_stop=
child=
stop() {
  asked_to_stop=1
  # mpirun hands SIGUSR1 on to every rank; SIGTERM it would not.
  [ -n "$child" ] && kill -USR1 "$child" 2>/dev/null
}
trap stop TERM INT USR1

limit="${SWITCHYARD_RESTARTS:-5}"
first_wait="${SWITCHYARD_BACKOFF_S:-5}"
wait_s="$first_wait" starts=0
while :; do
  before="$(newest)"
  # Ctrl-C reaches the whole process group: mpirun must not see it.
  setsid "${command[@]}" &
  child=$!
  wait "$child"; code=$?
  # A trapped signal ends `wait` early.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  child=
  case "$code" in
    0) exit 0 ;;
    75 | 1[3-5][0-9]) ;;
    *) echo "switchyard ended with exit code $code: not restarted" >&2; exit "$code" ;;
  esac
  [ -n "$asked_to_stop" ] && exit 75
  if [ "$(newest)" != "$before" ]; then starts=0 wait_s="$first_wait"; fi
  starts=$((starts + 1))
  if [ "$starts" -gt "$limit" ]; then
    echo "switchyard ended $starts times with exit code $code without a new checkpoint: giving up" >&2
    exit "$code"
  fi
  echo "exit code $code: starting again in $wait_s s (attempt $starts of $limit since the last checkpoint)" >&2
  sleep "$wait_s" &
  wait $!
  [ -n "$asked_to_stop" ] && exit 75
  wait_s=$((wait_s * 2 > 300 ? 300 : wait_s * 2))
done
