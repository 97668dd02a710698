#!/usr/bin/env python3
"""Training steps of Switchyard and of PyTorch on the same machine, alternately.

    python scripts/bench/against_pytorch.py --baselines DIR
    python scripts/bench/against_pytorch.py --baselines DIR --device cuda --models t5-base,switch-base-32

DIR holds `switch_torch.py`, a hand-written model, eager or with torch.compile, and `switch_hf.py`, which trains
transformers' model. Both print one JSON object with `step_ms` as their last line, and on a GPU `peak_GB`, what
`torch.cuda.max_memory_allocated` says.

Models are `t5-base`, `switch-base-N` and `tiny-N` with N experts, 0 for none; `:adamw` or `:adafactor` behind the
name chooses the optimizer, else `switch-base-N` has Adafactor and the others AdamW.

Each measurement is a process of its own. They take turns over all rows of a model, `--rounds` times: a machine
that slows down slows all of them. Prints a Markdown table of medians with the smallest and the largest, the time
relative to ours, and the peak memory: of the process on the CPU, of tensors on a GPU, both counted by LibTorch's
allocator there. A baseline that fails is a row that says so; the end of what it printed is on standard error.

Needs torch and transformers; the figures in docs/benchmarks.md name the versions.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

BASELINES = ("compile", "eager", "hf")


class Model:
    """A model by its name, and how each program is asked for it."""

    def __init__(self, name):
        found = re.fullmatch(r"(t5-base|switch-base-(\d+)|tiny-(\d+))(?::(adamw|adafactor))?", name)
        if not found:
            raise argparse.ArgumentTypeError(f"{name!r} is none of t5-base, switch-base-N and tiny-N")
        base, sparse, tiny, optimizer = found.groups()
        self.experts = int(sparse or tiny or 0)
        self.tiny = tiny is not None
        self.optimizer = optimizer or ("adafactor" if sparse else "adamw")
        self.name = f"{base}, {self.optimizer}"

    def ours(self):
        if self.tiny:
            preset, rows, inputs, targets = "tiny", 16, 128, 32
        else:
            preset, rows, inputs, targets = "t5-base" if self.experts == 0 else "switch-base-8", 64, 512, 114
        sizes = {"--rows": rows, "--inputs-length": inputs, "--targets-length": targets, "--capacity-factor": 1.25}
        size = [str(word) for pair in sizes.items() for word in pair]
        return ["--preset", preset, "--experts", str(self.experts), "--optimizer", self.optimizer, *size]

    def theirs(self):
        return ["--preset", "tiny" if self.tiny else "base", "--experts", str(self.experts)]


def commands(arguments, model):
    """Name and command of each row of `model`; ours come first."""
    on_gpu = arguments.device != "cpu"
    device = ["--device", arguments.device]
    ours = [arguments.switchyard, "bench", "step", *device, *model.ours(), "--json"]
    rows = {f"Switchyard {precision}": [*ours, "--precision", precision] for precision in arguments.precisions}
    steps = ["--steps", str(arguments.steps)]
    threads = [] if on_gpu else ["--threads", str(arguments.threads)]

    def script(name):
        return [arguments.python, os.path.join(arguments.baselines, name), *model.theirs(), *device, *threads]

    # The fastest AdamW that needs no compiler is torch's own.
    stock = "adamw-torch" if model.optimizer == "adamw" else "adafactor"
    # Both sides in the formats that ours are asked for, narrow weights with float32 masters.
    formats = sorted({"fp32" if precision == "fp32" else "bf16" for precision in arguments.precisions}, reverse=True)
    for baseline in arguments.against:
        for dtype in formats:
            if baseline == "hf":
                command = script("switch_hf.py") + ["--mode", "eager", "--opt", stock]
                command += ["--precision", {"fp32": "fp32", "bf16": "master"}[dtype]]
                rows[f"transformers {dtype}"] = command
                continue
            command = script("switch_torch.py") + ["--dtype", dtype, "--mode", baseline]
            if baseline == "compile" and on_gpu:
                command += ["--graph", "--attn", "flex", "--opt", model.optimizer]
            else:
                command += ["--attn", "sdpa" if on_gpu else "naive", "--opt", stock]
            rows[f"torch {baseline}{' + graph' if baseline == 'compile' and on_gpu else ''} {dtype}"] = command
    return {name: command + steps for name, command in rows.items()}


def last_object(text):
    """The JSON object that a program printed: over several lines or as the last one."""
    return json.loads(text if text.startswith("{\n") else text.strip().splitlines()[-1])


def measure(arguments, command):
    """Milliseconds a step and peak bytes of one process; an error in words if it fails."""
    environment = dict(os.environ)
    if arguments.device == "cpu":
        environment.update(
            OMP_NUM_THREADS=str(arguments.threads), RAYON_NUM_THREADS=str(arguments.threads), CUDA_VISIBLE_DEVICES=""
        )
    else:
        # Of both: LibTorch's allocator reads it wherever it runs.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            said = errors.read().strip().splitlines() or ["no word of why"]
            return f"exit {process.returncode}: {said[-1]}"
        text = out.read()
    try:
        found = last_object(text)
        step_ms = float(found["step_ms"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "printed no JSON object with step_ms"
    if arguments.device == "cpu":
        return step_ms, usage.ru_maxrss * 1024
    if "peak_GB" in found:
        return step_ms, found["peak_GB"] * 1e9
    device_memory = found.get("device_memory") or {}
    return step_ms, device_memory.get("peak_allocated_bytes")


def compare(arguments, model):
    """The rows of one model, measured in turn; a row that failed is not tried again."""
    rows = [{"model": model.name, "program": name, "command": command, "step_ms": [], "peak_bytes": []}
            for name, command in commands(arguments, model).items()]
    for number in range(arguments.rounds):
        for row in rows:
            if "error" in row:
                continue
            measured = measure(arguments, row["command"])
            if isinstance(measured, str):
                row["error"] = measured
                said = measured
            else:
                step_ms, peak = measured
                row["step_ms"].append(step_ms)
                row["peak_bytes"].append(peak)
                said = f"{step_ms:.1f} ms"
            print(f"round {number + 1}: {model.name}, {row['program']}: {said}", file=sys.stderr, flush=True)
    medians = {row["program"]: statistics.median(row["step_ms"]) for row in rows if "error" not in row}
    for row in rows:
        own = medians.get(row["program"])
        row["median_ms"] = own
        peaks = [peak for peak in row["peak_bytes"] if peak is not None]
        row["median_peak_bytes"] = statistics.median(peaks) if peaks and own else None
        row["times_ours"] = {
            precision: own / medians[f"Switchyard {precision}"]
            for precision in arguments.precisions
            if own and f"Switchyard {precision}" in medians
        }
    return rows


def markdown(arguments, rows):
    """One table over all models."""
    ratios = [f"times ours in {precision}" for precision in arguments.precisions]
    yield "| model | program | ms a step | peak memory, MiB | " + " | ".join(ratios) + " |"
    yield "|---|---|---:|---:|" + "---:|" * len(ratios)
    for row in rows:
        cells = [row["model"], row["program"]]
        if row["median_ms"] is None:
            cells += ["failed", "–", *("–" for _ in ratios)]
        else:
            times = row["step_ms"]
            cells.append(f"{row['median_ms']:.1f} ({min(times):.1f} to {max(times):.1f})")
            peak = row["median_peak_bytes"]
            cells.append("–" if peak is None else f"{peak / 2**20:.0f}")
            found = [row["times_ours"].get(precision) for precision in arguments.precisions]
            cells += ["–" if ratio is None else f"{ratio:.2f}" for ratio in found]
        yield "| " + " | ".join(cells) + " |"


def listed(of):
    """A parser of comma-separated words, each by `of`."""
    return lambda text: [of(word) for word in text.split(",")]


def one_of(*words):
    def parse(word):
        if word not in words:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(words)}")
        return word

    return parse


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baselines", required=True, help="directory of switch_torch.py and switch_hf.py")
    parser.add_argument("--switchyard", default="target/release/switchyard", help="the binary")
    parser.add_argument("--python", default=sys.executable, help="Python with torch and transformers")
    parser.add_argument("--device", default="cpu", help="`cpu`, `cuda` or `cuda:N`, of all programs")
    parser.add_argument("--models", type=listed(Model), help="default: tiny-8; on a GPU all of docs/benchmarks.md")
    parser.add_argument("--precisions", type=listed(one_of("fp32", "bf16", "selective")),
                        help="ours; default: fp32,selective, on a GPU selective")
    parser.add_argument("--against", type=listed(one_of(*BASELINES)),
                        help="baselines among `compile`, `eager` and `hf`; default: compile,hf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each process")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process on the CPU")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there, `-` for the output instead "
                        "of the table")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    on_gpu = arguments.device != "cpu"
    everything = "t5-base,switch-base-8,switch-base-32,switch-base-128"
    arguments.models = arguments.models or listed(Model)(everything if on_gpu else "tiny-8")
    arguments.precisions = arguments.precisions or (["selective"] if on_gpu else ["fp32", "selective"])
    arguments.against = arguments.against or ["compile", "hf"]
    return arguments


def main():
    arguments = parse()
    rows = [row for model in arguments.models for row in compare(arguments, model)]
    document = json.dumps({"device": arguments.device, "rounds": arguments.rounds, "rows": rows}, indent=2)
    if arguments.json == "-":
        print(document)
    else:
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as out:
                out.write(document + "\n")
        print("\n".join(markdown(arguments, rows)))
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
