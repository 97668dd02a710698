#!/usr/bin/env python3
"""Matrix products of Switchyard and of PyTorch (oneDNN, MKL) on the same cores, alternately.

    python scripts/bench/gemm_against_pytorch.py --switchyard target/release/switchyard

Asks `switchyard bench gemm` for its products and multiplies matrices of the same sizes, formats and
layouts with torch, in processes of their own and in turn, `--rounds` times. Prints a Markdown table of
medians. Needs torch; docs/benchmarks.md names the version.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def torch_times(products, precision, repeats):
    """Median milliseconds of each product."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    times = []
    for product in products:
        rows, inner, cols = product["rows"], product["inner"], product["cols"]
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, cols).to(dtype)
        # The same memory layouts: a transposed factor is a view.
        if product["form"] == "x^T g":
            left = left.t().contiguous().t()
        if product["form"] == "g w^T":
            right = right.t().contiguous().t()
        out = torch.empty(rows, cols, dtype=dtype)
        samples = []
        for _ in range(repeats + 3):
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            samples.append(time.perf_counter() - started)
        times.append(statistics.median(samples[3:]) * 1e3)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switchyard", default="target/release/switchyard", help="the binary")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=25, help="runs of each product in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--torch", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch:
        print(json.dumps(torch_times(json.loads(arguments.torch), arguments.precision, arguments.repeats)))
        return
    threads = str(arguments.threads)
    environment = dict(os.environ, OMP_NUM_THREADS=threads, RAYON_NUM_THREADS=threads, CUDA_VISIBLE_DEVICES="")
    common = ["--precision", arguments.precision]
    ours, theirs, peaks = [], [], []
    for _ in range(arguments.rounds):
        command = [arguments.switchyard, "bench", "gemm", *common, "--rounds", str(arguments.repeats), "--json"]
        found = json.loads(subprocess.check_output(command, env=environment))
        products = found["products"]
        peaks.append(found["peak_gflops"])
        ours.append([product["ms"] for product in products])
        command = [sys.executable, __file__, *common, "--repeats", str(arguments.repeats)]
        command += ["--torch", json.dumps(products)]
        theirs.append(json.loads(subprocess.check_output(command, env=environment)))
    peak = statistics.median(peaks)
    print(f"{found['instructions']}, {threads} threads, peak {peak:.0f} GFLOP/s, {arguments.precision}\n")
    print("| product | sizes | ms | GFLOP/s | of peak | torch, ms | torch takes |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for i, product in enumerate(products):
        rows, inner, cols = product["rows"], product["inner"], product["cols"]
        mine, other = (statistics.median(side[i] for side in times) for times in (ours, theirs))
        gflops = 2 * rows * inner * cols / mine / 1e6
        print(
            f"| {product['name']}, `{product['form']}` | {rows} x {inner} x {cols} | {mine:.3f} "
            f"| {gflops:.0f} | {gflops / peak:.0%} | {other:.3f} | {other / mine:.2f} |"
        )


if __name__ == "__main__":
    main()
