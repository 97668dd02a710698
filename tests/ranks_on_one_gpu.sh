#!/usr/bin/env bash
# Four ranks on one GPU: the same losses on any mesh, a killed and a stopped rank, a checkpoint that goes elsewhere.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: tests/ranks_on_one_gpu.sh [--device DEVICE] [--steps STEPS] [--text FILE] [--keep DIRECTORY]

Trains a small model with four ranks on one GPU, which NCCL allows for tests where each has an NCCL_HOSTID of its own,
and prints how far its losses are from those of one rank there and on the CPU; then kills one rank, stops another, and
lets a checkpoint of four ranks go on on one rank and on two of the CPU. Ends with 1 when something is not as it must be.

`--device cpu` and `--device libtorch` do the same without a GPU. FILE is any text of a few MB; without one the sample
of configs/quickstart.toml is used. Runs lie in DIRECTORY [default: one that is deleted]. STEPS [default: 200] must be at
least 10; DEVICE [default: cuda].

environment:
  SWITCHYARD    the program, built with libtorch for GPUs [default: switchyard on PATH, else target/release/switchyard]
USAGE
}

device=cuda steps=200 text= keep=
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --device) device="${2:?--device needs a name}"; shift 2 ;;
    --steps) steps="${2:?--steps needs a number}"; shift 2 ;;
    --text) text="$(realpath "${2:?--text needs a file}")"; shift 2 ;;
    --keep) keep="${2:?--keep needs a directory}"; shift 2 ;;
    *) echo "error: unknown argument $1; see --help" >&2; exit 1 ;;
  esac
done
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
program="${SWITCHYARD:-$(command -v switchyard || echo "$here/target/release/switchyard")}"
[ "$steps" -ge 10 ] || { echo "error: --steps must be at least 10" >&2; exit 1; }
[ -x "$program" ] || { echo "error: $program is not there; see --help" >&2; exit 1; }
program="$(realpath "$program")"
if [ -n "$keep" ]; then mkdir -p "$keep"; else keep="$(mktemp -d)" && trap 'rm -rf "$keep"' EXIT; fi
cd "$keep"

every=$((steps / 10))
sets=(precision.mode=fp32 model.d_kv=64 data.micro_batch_rows=8 schedule.warmup_steps=5 "schedule.total_steps=$steps"
  eval.every_steps=0 "checkpoint.every_steps=$every" checkpoint.keep_last=20 checkpoint.export=false
  trainer.log_every_steps=1)
[ -z "$text" ] || sets+=("data.sources=[{ path = \"$text\" }]")
options=()
for set in "${sets[@]}"; do options+=(--set "$set"); done

failed=0
fail() { echo "FAILED: $*"; failed=1; }

# launch RUN RANKS DEVICE [options] sets `pids` to the ranks' processes, `ended` waits and sets `codes`, `train` does both.
launch() {
  local run=$1 ranks=$2 on=$3 port=$((20000 + RANDOM % 20000)) rank
  shift 3
  mkdir -p "$run"
  pids=()
  for ((rank = 0; rank < ranks; rank++)); do
    env RANK=$rank WORLD_SIZE=$ranks LOCAL_RANK=$rank LOCAL_WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      NCCL_HOSTID="rank-$rank" NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 \
      "$program" train "$here/configs/quickstart.toml" --device "$on" --run-dir "$run/run" "${options[@]}" "$@" \
      >"$run/rank-$rank.txt" 2>&1 &
    pids+=($!)
  done
}
ended() {
  local pid code
  codes=()
  for pid in "${pids[@]}"; do
    code=0
    wait "$pid" 2>/dev/null || code=$?
    codes+=("$code")
  done
}
train() {
  launch "$@"
  ended
  [ "$(printf '%s\n' "${codes[@]}" | sort -u)" = 0 ] || fail "$1 ended with ${codes[*]}: $(tail -n 1 "$1/rank-0.txt")"
}
reached() { # RUN STEP
  local there
  for _ in $(seq 1 3000); do
    there="$(grep -c '"grad_norm"' "$1/run/metrics.jsonl" 2>/dev/null || true)"
    [ "${there:-0}" -lt "$2" ] || return 0
    sleep 0.1
  done
  fail "$1 did not come to step $2"
}

# compare A B TOLERANCE [FROM]: the first loss, all losses, the first gradient norm, relative.
compare() {
  python3 - "$@" <<'PY' || failed=1
import json
import sys


def steps(run):
    with open(f"{run}/run/metrics.jsonl") as lines:
        records = [json.loads(line) for line in lines]
    return {record["step"]: record for record in records if "grad_norm" in record}


one, other, tolerance = sys.argv[1], sys.argv[2], float(sys.argv[3])
a, b = steps(one), steps(other)
both = sorted(step for step in a if step in b and step >= int((sys.argv[4:] or [0])[0]))
apart = [abs(a[step]["loss"] - b[step]["loss"]) / abs(a[step]["loss"]) for step in both]
norm = abs(a[both[0]]["grad_norm"] - b[both[0]]["grad_norm"]) / a[both[0]]["grad_norm"]
right = apart[0] <= tolerance and norm <= max(tolerance, 1e-6)
print(f"{'ok' if right else 'FAILED'}: {other} beside {one}, steps {both[0]} to {both[-1]}: first loss {apart[0]:.1e}, "
      f"in the first 30 {max(apart[:30]):.1e}, in all {max(apart):.1e}, first gradient norm {norm:.1e}")
sys.exit(0 if right else 1)
PY
}

train one 1 "$device"
train cpu 1 cpu
compare one cpu 1e-6
for mesh in "1 1" "4 1" "2 2"; do
  read -r expert tensor <<<"$mesh"
  run="ep$expert-tp$tensor"
  train "$run" 4 "$device" --set "parallel.expert_parallel_size=$expert" --set "parallel.tensor_parallel_size=$tensor"
  compare one "$run" 1e-6
done
spread=(--set parallel.expert_parallel_size=4)

launch killed 4 "$device" "${spread[@]}"
reached killed $((every * 7 / 2))
kill -9 "${pids[2]}"
began=$SECONDS
ended
echo "killed rank 2: all ended after $((SECONDS - began)) s with ${codes[*]}"
[ "${codes[*]}" = "75 75 137 75" ] || fail "the other ranks of a killed one end with 75"
train killed 4 "$device" "${spread[@]}" --resume auto
compare ep4-tp1 killed 0

launch stopped 4 "$device" "${spread[@]}" --set comm.timeout_s=8
reached stopped "$every"
kill -STOP "${pids[1]}"
(sleep 30 && kill -9 "${pids[1]}") &
ended
echo "stopped rank 1: ended with ${codes[*]}: $(grep -h 'rank 1' stopped/rank-0.txt | tail -n 1)"
[ "${codes[0]} ${codes[2]} ${codes[3]}" = "75 75 75" ] || fail "the other ranks of a stopped one end with 75"

half=$((every * 5))
for there in "1 $device" "2 cpu"; do
  read -r ranks on <<<"$there"
  run="from-4-to-$ranks-$on"
  mkdir -p "$run/run/checkpoints"
  cp -r "ep4-tp1/run/checkpoints/step-$(printf %06d "$half")" "$run/run/checkpoints/"
  train "$run" "$ranks" "$on" --resume auto
  compare ep4-tp1 "$run" 1e-6 $((half + 1))
done
[ "$failed" = 0 ] && echo "all as it must be"
exit "$failed"
