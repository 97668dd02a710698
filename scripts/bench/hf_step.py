#!/usr/bin/env python3
"""Hugging Face's Switch Transformer at the sizes of Switchyard's preset `tiny`, on the CPU in float32.

    python scripts/bench/hf_step.py step --experts 8
    python scripts/bench/hf_step.py generate --batch 8

Prints one JSON object. Each measurement is a process of its own, so that `peak_memory_bytes` belongs
to it alone. Random weights and ids: only time and memory matter here, never the loss.

Needs torch and transformers; the figures in docs/benchmarks.md name the versions.
"""

import argparse
import json
import os
import statistics
import time

# Both must be set before torch is loaded.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROWS, INPUTS_LENGTH, TARGETS_LENGTH = 16, 128, 32
VOCABULARY = 32128


def build(experts):
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=256,
        d_ff=1024,
        d_kv=64,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=experts,
        # The library's default. It counts slots a row, so 64 of 128 drop next to nothing.
        expert_capacity=64,
        router_jitter_noise=0.01,
        # Switchyard's default for pretraining.
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config)


def step(arguments):
    import torch

    model = build(arguments.experts).train()
    # One fused pass over all parameters, the fastest AdamW that torch has.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, VOCABULARY - 128, (ROWS, length), generator=generator)

    times = []
    for number in range(arguments.warm_up + arguments.steps):
        inputs, targets = ids(INPUTS_LENGTH), ids(TARGETS_LENGTH)
        mask = torch.ones_like(inputs)
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        output = model(
            input_ids=inputs, attention_mask=mask, labels=targets, output_router_logits=True, use_cache=False
        )
        output.loss.backward()
        if arguments.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.clip_norm)
        optimizer.step()
        if number >= arguments.warm_up:
            times.append((time.perf_counter() - started) * 1e3)
    tokens = ROWS * (INPUTS_LENGTH + TARGETS_LENGTH)
    return {
        "experts": arguments.experts,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **spread("ms", times),
        "step_ms": statistics.median(times),
        "tokens_per_second": tokens / statistics.median(times) * 1e3,
        "loss": float(output.loss.detach()),
    }


def generate(arguments):
    import torch

    model = build(arguments.experts).eval()
    # No id ends a row: every run writes all its tokens.
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(3, VOCABULARY - 128, (arguments.batch, INPUTS_LENGTH), generator=generator)
    mask = torch.ones_like(inputs)
    times = []
    for number in range(1 + arguments.runs):
        started = time.perf_counter()
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
        )
        if number > 0:
            times.append(time.perf_counter() - started)
    expected = (arguments.batch, arguments.new_tokens + 1)
    if tuple(output.shape) != expected:
        raise SystemExit(f"generated {tuple(output.shape)} ids, expected {expected}")
    seconds = statistics.median(times)
    return {
        "experts": arguments.experts,
        "batch": arguments.batch,
        **spread("seconds", times),
        "seconds": seconds,
        "tokens_per_second": arguments.batch * arguments.new_tokens / seconds,
    }


def spread(unit, times):
    """The smallest and largest, and every single duration."""
    return {f"min_{unit}": min(times), f"max_{unit}": max(times), f"all_{unit}": [round(t, 4) for t in times]}


def peak_memory_bytes():
    """Largest resident size of this process so far, as `switchyard bench` reports it."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("step", help="whole training steps")
    steps.add_argument("--steps", type=int, default=20, help="steps that are measured")
    steps.add_argument("--warm-up", type=int, default=3, help="steps before those")
    steps.add_argument("--clip-norm", type=float, default=1.0, help="0 for no clipping")
    decoding = commands.add_parser("generate", help="greedy decoding with cached keys and values")
    decoding.add_argument("--batch", type=int, default=1)
    decoding.add_argument("--new-tokens", type=int, default=64)
    decoding.add_argument("--runs", type=int, default=5, help="runs that are measured, after one that is not")
    for command in (steps, decoding):
        command.add_argument("--experts", type=int, default=8)
    return parser.parse_args()


def main():
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    result = step(arguments) if arguments.command == "step" else generate(arguments)
    result["peak_memory_bytes"] = peak_memory_bytes()
    result["torch"] = torch.__version__
    result["transformers"] = transformers.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()
