"""Measure all that docs/benchmarks.md says about a GPU in one process: layers, steps, dispatcher, correctness."""

import argparse
import gc
import json
import random
import string
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe.bench import profile
from moe.bench.questions import MODEL, QUESTIONS, STEPS
from moe.bench.timing import TimingTable, product_flops, time_in_turns, timed_device
from moe.checks import first_line
from moe.config.words import with_words
from moe.launch.command_line import read_cells
from moe.options import OneLineParser


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    """Measure part after part. A part that fails gives a row with its error, so that the others are not lost."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        run = with_words([*made_up_text(Path(place), arguments.words), *MODEL], *arguments.overrides)
        read_cells([*run, f"out={place}"])  # raises ConfigError for overrides that cannot be used
        rounds = ["--rounds", str(arguments.rounds)]
        parts: dict[str, Callable[[], Iterator[TimingTable]]] = {
            "machine": machine,
            "steps": partial(steps, arguments, run, Path(place)),
            "layer": partial(_ask, "layer", [*rounds, "--tokens", str(arguments.tokens), "--dtype", "bf16,fp32"]),
            "models": partial(_ask, "step", [*rounds, *run]),
            "dispatch": partial(_ask, "dispatch", ["--experts", "64,256", "--out", str(arguments.out)]),
            "tests": partial(gpu_tests, arguments.workers),
        }
        tables: list[TimingTable] = []
        for name in arguments.parts:
            for table in _protected(name, parts[name]):
                tables.append(table)
                (arguments.out / "tables.json").write_text(json.dumps(dict(tables), indent=1))
                yield table


def _ask(question: str, words: list[str]) -> Iterator[TimingTable]:
    """Yield the answer of another question of the benchmarks."""
    parser = OneLineParser()
    QUESTIONS[question].options(parser)
    yield from QUESTIONS[question].answer(parser.read(words))


def _protected(name: str, part: Callable[[], Iterator[TimingTable]]) -> Iterator[TimingTable]:
    began = time.perf_counter()
    try:
        yield from part()
    except Exception as error:
        traceback.print_exc()
        yield TimingTable(f"{name} failed", [{"error": f"{type(error).__name__}: {first_line(error)}"}])
    gc.collect()
    print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def made_up_text(place: Path, vocabulary: int) -> list[str]:
    """Write text of random words that fills a vocabulary of this size, and return the overrides that train on it."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices(string.ascii_lowercase, k=8)) for _ in range(vocabulary)]
    texts = [" ".join(drawn.choices(words, k=700)) for _ in range(600)]
    (place / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = ["data=text", f"data.source.paths=[{place}/words.jsonl]", "data.source.column=text"]
    return [*source, f"data.vocab_size={vocabulary}", f"data.cache={place}/cache"]


def machine() -> Iterator[TimingTable]:
    """Measure the limits of the machine: a large product in each precision, and a copy."""
    words = torch.randn(2**28 if timed_device().type == "cuda" else 2**24, device=timed_device())
    copy = time_in_turns([("copy", words.clone)], rounds=5)["copy"]
    yield TimingTable(
        "limits of the machine",
        [
            {
                "device": str(timed_device()),
                "TFLOP / s, bf16": product_flops(torch.bfloat16) / 1e12,
                "TFLOP / s, fp32": product_flops(torch.float32) / 1e12,
                "copy, TB / s": 2 * words.nbytes / copy / 1e12,
            }
        ],
    )


def steps(arguments: argparse.Namespace, run: list[str], place: Path) -> Iterator[TimingTable]:
    """Profile the training step in each variant. Kernels and waits of each are written to a file of their own."""
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(arguments.steps):
        found = None
        try:
            found = profile.profile_step(
                with_words(run, *STEPS[name]), rounds=arguments.rounds, folder=place / str(number)
            )
        except Exception as error:
            traceback.print_exc()
            yield TimingTable(f"{name} failed", [{"error": f"{type(error).__name__}: {first_line(error)}"}])
        gc.collect()
        if found is not None:
            rows.append({"step": name, **found.summary})
            tables = [TimingTable("kernels", found.kernels), TimingTable("waits of the host", found.waits)]
            text = "\n\n".join(table.markdown() for table in tables if table.rows)
            (arguments.out / f"profile-{name.replace(' ', '-').replace('=', '-')}.md").write_text(text + "\n")
    if rows:
        yield TimingTable(f"training step: {' '.join(arguments.overrides) or 'model=base'}", rows)


def gpu_tests(workers: int) -> Iterator[TimingTable]:
    """Run the tests on the GPU. They need the folder tests/ of the repository."""
    tests = Path(__file__).resolve().parents[2] / "tests" / "gpu"
    options = ["-m", "gpu", "-n", str(workers), "-p", "no:benchmark"]  # that plugin warns of several workers
    command = [sys.executable, "-m", "pytest", "-q", *options, str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parents[1])
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    yield TimingTable("tests on a GPU", [{"pytest": lines[-1], "status": done.returncode}])
