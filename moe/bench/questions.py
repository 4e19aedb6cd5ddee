"""The questions of the benchmarks and their options, without what takes seconds to import."""

import argparse
import os
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moe.config.options import options
from moe.options import folder, one_of, positive, seed, several, whole


class Shape(NamedTuple):
    """E experts, K of them per token, width D, expert width F, T tokens."""

    experts: int
    k: int
    dim: int
    ffn: int
    tokens: int


SHAPES = {
    "a": Shape(8, 2, 384, 1536, 4096),
    "b": Shape(32, 4, 256, 512, 2048),
    "c": Shape(8, 2, 128, 512, 2048),
    "d": Shape(128, 2, 128, 256, 2048),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # and their names in PyTorch
# The grids of three of our experiments, whose planned claims are judged too. Only names and numbers of levels matter.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "noise_lb_seed": {"noise": [0.0, 0.1, 0.5], "lb": [0.0, 0.01]},
    "temperature_ablation": {"router.temp": [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]},
    "experiment_c": {"router": ["switch", "topk_hard", "softk", "hash", "expert_choice"]},
}
MODEL = "model=base model.expert=silu batch_size=24 data.seq_len=512 precision=bf16".split()
STEPS = {
    "as configured": [],
    "cuda_graph=false": ["cuda_graph=false"],
    "capacity=1.25": ["capacity=1.25"],
    "gradient_checkpointing=true": ["gradient_checkpointing=true"],
    "precision=fp32": ["precision=fp32"],
    "compile=true": ["compile=true"],
}
PARTS = dict.fromkeys(("machine", "steps", "layer", "models", "dispatch", "tests"))


def _layer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shapes",
        type=several(one_of(SHAPES)),
        default=",".join(SHAPES),
        help="shapes of docs/benchmarks.md (%(default)s)",
    )
    own = "tokens of every shape, in place of its own; a GPU needs many"
    add("--tokens", type=several(whole), default=[None], help=own)
    add("--dtype", type=several(one_of(DTYPES)), default="fp32", help="fp32 and bf16 (%(default)s)")
    add("--rounds", type=whole, default=15, help="rounds of which the median counts (%(default)s)")


def _step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="overrides of the run, as for train.py: model=small batch_size=32")
    parser.add_argument("--rounds", type=whole, default=15, help="rounds of which the median counts (%(default)s)")


def _profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="overrides of the run, as for train.py: model=small batch_size=32")
    parser.add_argument("--rounds", type=whole, default=5, help="rounds of ten steps (5)")
    parser.add_argument("--top", type=whole, default=25, help="kernels to show (25)")


def _routers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", help="overrides of the run, as for train.py: model=small batch_size=32")
    add("--routers", type=several(one_of(options("router"))), help="names of routers (all that need no further key)")
    add("--rounds", type=whole, default=9, help="rounds of which the median counts (%(default)s)")


def _growth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=whole, default=5, help="rounds of which the median counts (%(default)s)")


def _dispatch(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--experts", type=several(whole), default="64,128,256", help="numbers of experts (%(default)s)")
    add("--k", type=several(whole), default="1,2,4", help="numbers of experts per token (%(default)s)")
    capacities = "0.9,1.0,1.05,1.1,1.15,1.25,1.5"
    add("--capacity", type=several(positive), default=capacities, help="capacity factors (%(default)s)")
    add("--tokens", type=whole, default=32_768, help="tokens that are routed (%(default)s)")
    add("--dim", type=whole, default=256, help="width of a token (%(default)s)")
    add("--seed", type=seed, default=17, help="seed of the logits and tokens (%(default)s)")
    add("--iterations", type=whole, default=5, help="rounds of which the median counts (%(default)s)")
    add("--out", type=folder, default="results", help="folder of the rows and figures (%(default)s)")


def _jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="overrides of every run, added to those of a small model")
    parser.add_argument("--jobs", type=whole, default=os.cpu_count(), help="runs at a time (number of CPUs)")
    parser.add_argument("--steps", type=whole, default=100, help="steps of each run (%(default)s)")
    parser.add_argument("--seeds", type=whole, default=4, help="seeds, each with two balance weights (%(default)s)")


def _footprint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="words of a command of train.py; its folder `out` is temporary")


def _analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=whole, default=1000, help="number of synthetic runs (%(default)s)")
    parser.add_argument("--steps", type=whole, default=500, help="steps in the event log of each run (%(default)s)")


def _errors(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    grids = f"whose grids: {', '.join(GRIDS)} (all)"
    add("--experiments", nargs="+", default=list(GRIDS), choices=list(GRIDS), metavar="NAME", help=grids)
    add("--studies", type=whole, default=200, help="simulated reports for each row (%(default)s)")
    add("--tests", type=whole, default=20_000, help="simulated studies for each row about single tests (%(default)s)")
    add("--seeds", type=several(whole), default="3,5", help="numbers of seeds of the reports (%(default)s)")
    add("--jobs", type=whole, default=os.cpu_count(), help="rows that are simulated at a time (number of CPUs)")


def _power(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    claims = f"whose claims: {', '.join(GRIDS)} (noise_lb_seed)"
    add("--experiments", nargs="+", default=["noise_lb_seed"], choices=list(GRIDS), metavar="NAME", help=claims)
    add("--effect", type=positive, default=2.0, help="true effect, in standard deviations of paired differences (2)")
    add("--studies", type=whole, default=200, help="simulated reports for each claim (%(default)s)")
    add("--jobs", type=whole, default=os.cpu_count(), help="claims that are simulated at a time (number of CPUs)")


def _speed_ups(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--studies", type=whole, default=100, help="simulated studies for each number (%(default)s)")
    add("--resamples", type=whole, default=100, help="resamples of seeds for each interval (%(default)s)")
    add("--seeds", type=several(whole), default="3,5,8", help="numbers of seeds (%(default)s)")


def _suite(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", help=f"overrides of the run, added to {' '.join(MODEL)}")
    add("--parts", type=several(one_of(PARTS)), default=",".join(PARTS), help="what to measure (%(default)s)")
    add("--steps", type=several(one_of(STEPS)), default=",".join(STEPS), help="steps to measure (%(default)s)")
    add("--rounds", type=whole, default=5, help="rounds of which the median counts (%(default)s)")
    add("--tokens", type=whole, default=49152, help="tokens of each layer (%(default)s)")
    add("--words", type=whole, default=49152, help="vocabulary of the made-up text (%(default)s)")
    add("--workers", type=whole, default=8, help="processes of the tests on a GPU (%(default)s)")
    add("--out", type=folder, default="results/suite", help="folder of the tables and profiles (%(default)s)")


class Question(NamedTuple):
    """A question of the benchmarks.

    module: the file of `moe/bench` that answers it. options: adds its options to a parser.
    """

    module: str
    options: Callable[[argparse.ArgumentParser], None]

    def answer(self, arguments: argparse.Namespace) -> Iterator[Any]:
        """Import the module, which may take seconds, and return the tables of its answer, each a `TimingTable`."""
        answer: Callable[[argparse.Namespace], Iterator[Any]] = pkgutil.resolve_name(f"moe.bench.{self.module}:answer")
        return answer(arguments)


QUESTIONS = {
    "layer": Question("layer", _layer),
    "step": Question("step", _step),
    "profile": Question("profile", _profile),
    "routers": Question("routers", _routers),
    "growth": Question("growth", _growth),
    "dispatch": Question("dispatch", _dispatch),
    "sweep": Question("jobs", _jobs),
    "footprint": Question("footprint", _footprint),
    "analyze": Question("analyze", _analyze),
    "errors": Question("errors", _errors),
    "power": Question("power", _power),
    "speed-ups": Question("speed_ups", _speed_ups),
    "suite": Question("suite", _suite),
}
