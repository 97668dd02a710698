#!/usr/bin/env python3
"""Training steps of Switchyard and of PyTorch on the same cores, alternately.

    python scripts/bench/against_pytorch.py --baselines DIR --switchyard target/release/switchyard

DIR holds `switch_torch.py`, a hand-written model with torch.compile, and `switch_hf.py`, which trains
transformers' model; both print one JSON object with `step_ms`. Each measurement is a process of its
own, in turn over all rows, `--rounds` times: a machine that slows down slows all of them. Prints a
Markdown table of medians, with the largest resident size of each process.

Needs torch and transformers; the figures in docs/benchmarks.md name the versions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile


def rows(arguments):
    """Name and command of each row."""
    size = ["--preset", "tiny", "--experts", str(arguments.experts)]
    torch = [sys.executable, os.path.join(arguments.baselines, "switch_torch.py"), *size, "--device", "cpu"]
    torch += ["--mode", "compile", "--attn", "naive", "--opt", "adamw-torch", "--warmup", "3"]
    hf = [sys.executable, os.path.join(arguments.baselines, "switch_hf.py"), *size, "--device", "cpu"]
    ours = [arguments.switchyard, "bench", "step", *size, "--optimizer", "adamw", "--json"]
    steps = ["--steps", str(arguments.steps)]
    table = {
        "Switchyard fp32": ours + ["--precision", "fp32"],
        "Switchyard selective": ours + ["--precision", "selective"],
        "torch.compile fp32": torch + ["--dtype", "fp32"],
        "torch.compile bf16": torch + ["--dtype", "bf16"],
        "transformers fp32": hf + ["--precision", "fp32"],
        "transformers bf16": hf + ["--precision", "master"],
    }
    if arguments.experts == 0:
        table = {name: command for name, command in table.items() if not name.startswith("transformers")}
    return {name: command + steps for name, command in table.items()}


def measure(command, threads):
    """Milliseconds a step and peak bytes of one process."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(f"failed: {' '.join(command)}")
        out.seek(0)
        text = out.read()
    # Ours is one object over several lines, theirs one line after others.
    found = json.loads(text if text.startswith("{\n") else text.strip().splitlines()[-1])
    return found["step_ms"], usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baselines", required=True, help="directory of switch_torch.py and switch_hf.py")
    parser.add_argument("--switchyard", default="target/release/switchyard", help="the binary")
    parser.add_argument("--experts", type=int, default=8, help="0 for a dense model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each process")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    commands = rows(arguments)
    times = {name: [] for name in commands}
    peaks = {name: [] for name in commands}
    for round_number in range(arguments.rounds):
        for name, command in commands.items():
            step_ms, peak = measure(command, arguments.threads)
            times[name].append(step_ms)
            peaks[name].append(peak)
            print(f"round {round_number + 1}: {name} {step_ms:.1f} ms", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| | ms a step | peak memory, MiB | times ours in fp32 | times ours in selective |")
    print("|---|---|---|---|---|")
    for name, step_ms in medians.items():
        ratios = [f"{step_ms / medians[f'Switchyard {mode}']:.2f}" for mode in ("fp32", "selective")]
        peak = statistics.median(peaks[name]) / 2**20
        print(f"| {name} | {step_ms:.0f} | {peak:.0f} | {ratios[0]} | {ratios[1]} |")


if __name__ == "__main__":
    main()
