"""A run on several ranks trains the same model as a run on one rank.

The ranks are real processes, which Accelerate starts with the files in conf/launch/.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_runs import untimed
from torch import Tensor

from moe.config.options import CONF
from moe.distributed import ranks
from moe.distributed.exchange import run_distributed_experts
from moe.files import sha256
from moe.model.decoder import MoEForCausalLM

pytestmark = pytest.mark.ranks

TRAIN = str(CONF.parent / "train.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
LAUNCH = {
    "replicated": [*ACCELERATE, str(CONF / "launch/ddp.yaml"), TRAIN],
    "sharded": [*ACCELERATE, str(CONF / "launch/fsdp.yaml"), TRAIN],
    "experts": [*ACCELERATE, str(CONF / "launch/ddp.yaml"), TRAIN, "expert_parallel=true"],
}
# everything that could depend on how tokens are divided: noise, dropout, capacity, balance losses of three scopes,
# a batch size that is odd
STEP = "grad_accum=4 batch_size=3 noise=0.3 lb_sequence=0.1 lb_global=0.1 z=0.01".split()


def command(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def only_run(folder: Path) -> Path:
    [run] = folder.glob("*/*/")
    return run


def differences(a: Any, b: Any) -> list[float]:
    """Return the relative differences of all numbers in two equal nested structures."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for key in a for d in differences(a[key], b[key])]
    if isinstance(a, list):
        return [d for x, y in zip(a, b, strict=True) for d in differences(x, y)]
    if isinstance(a, float) and isinstance(b, float):
        return [abs(a - b) / max(1e-2, abs(a))]
    assert a == b
    return []


@pytest.fixture(scope="module")
def alone(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that returns the folder of a run on one process with these overrides, which is trained only once."""
    known: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in known:
            out = tmp_path_factory.mktemp("alone")
            done = command([sys.executable, TRAIN, *small, *STEP, *overrides, f"out={out}"])
            assert done.returncode == 0, done.stderr
            known[overrides] = only_run(out)
        return known[overrides]

    return run


@pytest.mark.parametrize("layout", LAUNCH)
@pytest.mark.parametrize(
    "overrides",
    [
        ("router=temperature", "capacity=1.25"),
        ("router=spectra", "optimizer=adamw"),  # routers of all layers share a module
        ("router=chain_of_experts", "lb_global=0.0", "model.expert=swiglu", "gradient_checkpointing=true"),
    ],
    ids=lambda words: words[0].removeprefix("router="),
)
def test_two_ranks_are_one(
    layout: str, overrides: tuple[str, ...], small: list[str], alone: Any, tmp_path: Path
) -> None:
    if layout != "experts":  # divided experts draw dropout on their own rank, so other numbers
        overrides = (*overrides, "model.dropout=0.1")
    one = alone(*overrides)
    done = command([*LAUNCH[layout], *small, *STEP, *overrides, f"out={tmp_path}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step ") == 3  # only one rank prints
    two = only_run(tmp_path)
    assert json.loads((two / "run.json").read_text())["facts"]["ranks"] == {"number": 2, "layout": layout}

    weights, expected = (load_file(run / "model/model.safetensors") for run in (two, one))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        apart, length = (weights[name] - weight).double().norm(), weight.double().norm()
        assert apart <= 1e-3 * length + 1e-6, name
    assert max(differences(untimed(two), untimed(one))) < 1e-2
    first_two, first = (next(e for e in untimed(run) if e["kind"] == "train") for run in (two, one))
    counted = [key for key in first if any(word in key for word in ("load_cv", "load_gini", "drop_rate", "overlap"))]
    assert counted
    assert all(first_two[key] == pytest.approx(first[key], rel=1e-12) for key in counted)  # counts, before any update
    MoEForCausalLM.from_pretrained(two / "model")
    assert (two / "trace/step-00000006.npz").exists()


def test_two_replicas_are_one_to_the_last_bit(small: list[str], alone: Any, tmp_path: Path) -> None:
    """Two numbers can be added in one order only. With more ranks, the order of additions changes the last bits."""
    overrides = ("router=topk", "grad_accum=2", "model.dropout=0.1")
    done = command([*LAUNCH["replicated"], *small, *STEP, *overrides, f"out={tmp_path}"])
    assert done.returncode == 0, done.stderr
    one, two = (run / "model/model.safetensors" for run in (alone(*overrides), only_run(tmp_path)))
    assert sha256(one) == sha256(two)


def test_a_sweep_on_two_ranks_skips_finished_cells(small: list[str], tmp_path: Path) -> None:
    words = [*LAUNCH["replicated"], "-m", *small, *STEP, "seed=1,2", "steps=2", f"out={tmp_path}"]
    done = command(words)
    assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.glob("*/*/run.json"))
    assert len(runs) == 2
    before = [path.stat().st_mtime_ns for path in runs]
    again = command(words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("skipped") == 2
    assert [path.stat().st_mtime_ns for path in runs] == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["grad_accum=3"], "grad_accum=3: must be a multiple of the 2 processes of this launch"),
        (["expert_parallel=true", "model.num_experts=5"], "model.num_experts=5: must be a multiple of the 2 processes"),
        (["-m", "seed=1,2", "hydra/launcher=joblib"], "hydra/launcher=joblib: must be basic"),
    ],
)
def test_settings_that_cannot_be_divided_over_the_ranks_are_refused_at_once(
    words: list[str], line: str, small: list[str], tmp_path: Path
) -> None:
    done = command([*LAUNCH["replicated"], *sorted([*small, *STEP, *words], key="-m".__ne__), f"out={tmp_path}/runs"])
    assert done.returncode != 0
    complaints = [each for each in done.stderr.splitlines() if each.startswith("train.py: ")]
    assert len(complaints) == 1
    assert line in complaints[0]
    assert not (tmp_path / "runs").exists()


# ---- Experts on several ranks, compared with one process that has all experts -------------------------------------


def linear(stack: Tensor) -> Any:
    return lambda rows, counts: torch.cat(
        [part @ matrix.T for part, matrix in zip(rows.split(counts.tolist()), stack, strict=True)]
    )


def compare_with_all_experts(rank: int, store: str) -> None:
    ranks_, experts, dim = 3, 6, 4
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks_)
    stack = torch.randn(experts, dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    local = stack[2 * rank : 2 * rank + 2].clone().requires_grad_()
    for turn in range(4):
        batches = []
        for each in range(ranks_):  # every rank makes the rows of all ranks, to compute what it expects
            generator = torch.Generator().manual_seed(10 * turn + each)
            counts = torch.randint(0, 4, (experts,), generator=generator)
            if turn == 1 or (turn == 2 and each == 1):
                counts[2:] = 0  # the experts of some ranks, or of all ranks but one, get no rows
            if turn == 3:
                counts[:] = 0
            rows = torch.randn(int(counts.sum()), dim, dtype=torch.float64, generator=generator)
            batches.append((rows, counts))
        rows, counts = batches[rank]
        rows.requires_grad_()
        whole = stack.clone().requires_grad_()
        expected = [linear(whole)(*batch) for batch in batches]
        outputs = run_distributed_experts(rows, counts, linear(local))
        torch.testing.assert_close(outputs, expected[rank])
        [from_outputs] = torch.autograd.grad(outputs.square().sum(), rows, retain_graph=True)
        [by_hand] = torch.autograd.grad(expected[rank].square().sum(), rows, retain_graph=True)
        torch.testing.assert_close(from_outputs, by_hand)
        gradient = torch.autograd.grad(outputs.square().sum(), local)[0]
        everything = torch.autograd.grad(sum(part.square().sum() for part in expected), whole)[0]
        torch.testing.assert_close(gradient, everything[2 * rank : 2 * rank + 2])
    dist.destroy_process_group()


def test_distributed_experts_give_the_outputs_and_gradients_of_local_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare_with_all_experts, args=(str(tmp_path / "store"),), nprocs=3)


def test_a_single_process_is_one_rank() -> None:
    assert (ranks.world_size(), ranks.rank(), ranks.broadcast("x"), ranks.all_reduce_max(3)) == (1, 0, "x", 3)
    tensors = [torch.tensor([1.0, math.nan]), torch.arange(3)]
    assert all(torch.equal(a, b) or a is b for a, b in zip(ranks.all_reduce_sum(tensors), tensors, strict=True))
    assert ranks.sum_of_lower_ranks(torch.arange(3)).tolist() == [0, 0, 0]
