#!/usr/bin/env bash
# Measures how training steps scale over the GPUs of a machine, one rank each.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/scale-gpus.sh [--gpus "1 2 4 8"] [--rows ROWS] [--steps STEPS] [--device DEVICE] [--mpirun "OPTIONS"] [MODEL...]

For each MODEL and each number of GPUs runs `mpirun … switchyard bench step --device cuda` with ROWS rows of 512 + 114
tokens a GPU [default: 64], and `switchyard bench collectives` with a message as large as the tokens of one sparse
layer. Prints a Markdown table: milliseconds a step, tokens a second, the efficiency (the step of the first number of
GPUs over this one), and, for Switch-Base with its experts spread, which share of the step its all-to-alls take if
nothing hides them.

A MODEL is PRESET:EXPERTS:OPTIMIZER:EXPERT_PARALLEL_SIZE; `n` is the number of GPUs, and `Nn` as many for each.
Without any: t5-base:0:adamw:1, switch-base-8:8n:adafactor:n and switch-base-128:128:adafactor:n.

--gpus [default: "1 2 4 8"] must name no more than the machine has; STEPS [default: 20]; DEVICE [default: cuda].

environment:
  SWITCHYARD    the program, built with libtorch and mpi [default: switchyard on PATH, else target/release/switchyard]

examples:
  launch/scale-gpus.sh
  launch/scale-gpus.sh --gpus "2 4 8" switch-base-128:128:adafactor:n
  launch/scale-gpus.sh --gpus "1 2" --device cpu --rows 4 --mpirun "--oversubscribe" tiny:4n:adafactor:n
USAGE
}

gpus="1 2 4 8" rows=64 steps=20 device=cuda extra=
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --gpus) gpus="${2:?--gpus needs numbers}"; shift 2 ;;
    --rows) rows="${2:?--rows needs a number}"; shift 2 ;;
    --steps) steps="${2:?--steps needs a number}"; shift 2 ;;
    --device) device="${2:?--device needs a name}"; shift 2 ;;
    --mpirun) extra="${2?--mpirun needs options}"; shift 2 ;;
    -*) echo "error: unknown option $1; see --help" >&2; exit 1 ;;
    *) break ;;
  esac
done
models=("$@")
[ ${#models[@]} -gt 0 ] || models=(t5-base:0:adamw:1 switch-base-8:8n:adafactor:n switch-base-128:128:adafactor:n)

program="${SWITCHYARD:-$(command -v switchyard || echo "$(dirname "$0")/../target/release/switchyard")}"
for needed in "$program" mpirun python3; do
  command -v "$needed" >/dev/null || { echo "error: $needed is not there; see --help" >&2; exit 1; }
done

# on N ARGUMENTS…: the program on N GPUs.
on() {
  local ranks=$1
  shift
  # Options are words: they are meant to split.
  # shellcheck disable=SC2086
  mpirun -n "$ranks" --bind-to none $extra "$program" --device "$device" "$@"
}

# times WORD RANKS: `n` and `Nn` as numbers.
times() {
  case "$1" in
    n) echo "$2" ;;
    *n) echo $((${1%n} * $2)) ;;
    *) echo "$1" ;;
  esac
}

# value JSON KEY
value() { python3 -c 'import json, sys; print(json.loads(sys.argv[1])[sys.argv[2]])' "$1" "$2"; }

echo "| model | GPUs | ms a step | tokens a second | efficiency | all-to-alls, share of the step |"
echo "|---|---:|---:|---:|---:|---:|"
for model in "${models[@]}"; do
  IFS=: read -r preset experts optimizer expert_parallel <<<"$model"
  [ -n "$expert_parallel" ] || { echo "error: $model is not PRESET:EXPERTS:OPTIMIZER:EXPERT_PARALLEL_SIZE" >&2; exit 1; }
  first=
  for ranks in $gpus; do
    step="$(on "$ranks" bench step --json --precision selective --preset "$preset" --optimizer "$optimizer" \
      --experts "$(times "$experts" "$ranks")" --expert-parallel-size "$(times "$expert_parallel" "$ranks")" \
      --rows $((rows * ranks)) --inputs-length 512 --targets-length 114 --steps "$steps")"
    all_to_all=
    if [[ "$preset" = switch-base-* ]] && [ "$(times "$expert_parallel" "$ranks")" -gt 1 ]; then
      # Slots of one GPU's encoder tokens at capacity factor 1.25, of 768 values in bfloat16.
      mebibytes="$(python3 -c "print($rows * 512 * 1.25 * 768 * 2 / 2**20)")"
      all_to_all="$(on "$ranks" bench collectives --mebibytes "$mebibytes" --json | python3 -c '
import json, sys
rows = json.load(sys.stdin)
print(next(row["median_ms"] for row in rows if row["operation"] == "all_to_all"))')"
    fi
    python3 - "$preset, $(times "$experts" "$ranks") experts" "$ranks" "$(value "$step" step_ms)" \
      "$(value "$step" tokens_per_second)" "${first:-0}" "${all_to_all:-nan}" <<'PY'
import sys

model, ranks, step_ms, tokens, first, all_to_all = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
# There and back, forward and backward, in six encoder layers and, with 114 of 512 tokens, six of the decoder.
share = 4 * 6 * (1 + 114 / 512) * all_to_all / step_ms
share = f"{share:.0%}" if share == share else "–"
print(f"| {model} | {ranks} | {step_ms:.1f} | {tokens:,.0f} | {(first or step_ms) / step_ms:.2f} | {share} |")
PY
    first="${first:-$(value "$step" step_ms)}"
  done
done
