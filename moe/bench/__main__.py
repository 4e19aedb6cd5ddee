"""The command line of the benchmarks: `python -m moe.bench layer|step|dispatch|analyze`."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from moe import process
from moe.bench import analyze
from moe.bench.compare import SHAPES, Variant, interleave, layer_variants, step_variants, table
from moe.bench.dispatch import sweep


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe.bench", description=__doc__)
    questions = parser.add_subparsers(dest="question", required=True)
    layer = questions.add_parser("layer", help="one MoE layer beside a dense one and transformers' Mixtral block")
    layer.add_argument("--shapes", type=_list(str), default=list(SHAPES), help="a,b,c,d: see docs/benchmarks.md")
    step = questions.add_parser("step", help="a training step of model=tiny beside dense and transformers' Mixtral")
    dispatch = questions.add_parser("dispatch", help="drop rate and speed of the dispatcher, by capacity factor")
    dispatch.add_argument("--experts", type=_list(int), default=[64, 128, 256])
    dispatch.add_argument("--k", type=_list(int), default=[1, 2, 4])
    dispatch.add_argument("--capacity", type=_list(float), default=[0.9, 1.0, 1.05, 1.1, 1.15, 1.25, 1.5])
    dispatch.add_argument("--tokens", type=int, default=32_768)
    dispatch.add_argument("--dim", type=int, default=256)
    dispatch.add_argument("--seed", type=int, default=17)
    dispatch.add_argument("--iterations", type=int, default=5)
    dispatch.add_argument("--out", type=Path, default=Path("results"))
    analysis = questions.add_parser("analyze", help="seconds and memory of analyze.py over many run folders")
    analysis.add_argument("--runs", type=int, default=1000)
    analysis.add_argument("--steps", type=int, default=500)
    for comparison in (layer, step):
        comparison.add_argument("--rounds", type=int, default=15)
        comparison.add_argument("--json", type=Path, help="write the medians, in seconds, here too")
    for question in (layer, step, dispatch):
        question.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    if arguments.question == "analyze":
        cost = analyze.measure(runs=arguments.runs, steps=arguments.steps)
        print(
            f"{arguments.runs} runs of {arguments.steps} steps: {cost.seconds:.1f} s, of which {cost.cpu_seconds:.1f} s"
            f" on a CPU, {cost.gigabytes:.2f} GB at its peak, load {os.getloadavg()[0]:.1f}"
        )
        return
    process.set_up(threads=arguments.threads)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}, fp32\n")
    if arguments.question == "dispatch":
        grid = {"experts": arguments.experts, "ks": arguments.k, "capacities": arguments.capacity}
        sizes = {name: getattr(arguments, name) for name in ("tokens", "dim", "seed", "iterations")}
        rows = sweep(arguments.out, **grid, **sizes)
        print(rows.pivot(index=["num_experts", "top_k"], columns="capacity_factor", values="avg_drop_rate").round(5))
        print(f"\n{arguments.out}")
        return
    results = {}
    for title, variants in _comparisons(arguments):
        results[title] = interleave(variants, rounds=arguments.rounds)
        print(table(title, results[title]) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def _comparisons(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Variant]]]:
    if arguments.question == "step":
        yield "training step: model=tiny, SwiGLU, 16 x 128 tokens", step_variants(4096, 16, 128)
        return
    for name in arguments.shapes:
        sizes = ", ".join(f"{letter}={size}" for letter, size in SHAPES[name]._asdict().items())
        yield f"layer {name}: {sizes}", layer_variants(SHAPES[name])


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A comma-separated list as an argparse type."""
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
