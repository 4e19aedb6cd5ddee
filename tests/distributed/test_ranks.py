"""Tests that a run on several ranks trains the same model as a run on one rank.

The ranks are real processes. Accelerate starts them with the files in conf/launch/. Where the start is not what is
tested, they are forked with the variables that Accelerate gives to ranks: each start would import PyTorch three times.
"""

import json
import math
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_runs import untimed
from torch import Tensor
from train_processes import TRAIN, run_ranks, run_script

from moe.config.options import CONF, complete
from moe.distributed import ranks
from moe.distributed.exchange import run_distributed_experts
from moe.files import sha256
from moe.launch.command_line import read_cells
from moe.model.causal_lm import MoEForCausalLM

pytestmark = pytest.mark.ranks

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
LAUNCH = {
    "replicated": [*ACCELERATE, str(CONF / "launch/ddp.yaml"), str(TRAIN)],
    "sharded": [*ACCELERATE, str(CONF / "launch/fsdp.yaml"), str(TRAIN)],
    "experts": [*ACCELERATE, str(CONF / "launch/ddp.yaml"), str(TRAIN), "expert_parallel=true"],
}
# Settings whose results could depend on how tokens are divided among ranks: noise, balance losses of three scopes, and
# an odd batch size. The tests add dropout and capacity.
STEP = "grad_accum=4 batch_size=3 noise=0.3 lb_sequence=0.1 lb_global=0.1 z=0.01".split()
# The layers have 4 and 8 experts, of which a token takes two and one.
BY_LAYER = "model.experts_by_layer=1:8", "model.routers=1:k:1"


def run_command(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command. Capture its output."""
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@cache
def variables_of_ranks(layout: str) -> list[dict[str, str]]:
    """Return the variables of each rank that Accelerate starts in a layout."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "rank.py")
        script.write_text(
            "import json, os, pathlib\n"
            "pathlib.Path(__file__).with_name(os.environ['RANK']).write_text(json.dumps({**os.environ}))"
        )
        done = run_command([str(script) if word == str(TRAIN) else word for word in LAUNCH[layout]])
        assert done.returncode == 0, done.stderr
        return [json.loads(Path(folder, rank).read_text()) for rank in "01"]


def train_on_two_ranks(layout: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run train.py on two ranks that have the variables of Accelerate's launcher. They find each other without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {"MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    words = LAUNCH[layout]
    environments = [variables | own for variables in variables_of_ranks(layout)]
    return run_ranks(environments, *words[words.index(str(TRAIN)) + 1 :], *overrides)


def only_run(folder: Path) -> Path:
    """Return the folder of the single run below `folder`."""
    [run] = folder.glob("*/*/")
    return run


def differences(a: Any, b: Any) -> list[float]:
    """Return the relative differences of all numbers in two nested structures.

    Asserts that everything else in the structures is equal.
    """
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
def train_on_one_process(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains a run on one process and returns its folder.

    Equal overrides are trained only once.
    """
    folders: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in folders:
            out = tmp_path_factory.mktemp("one_process")
            done = run_script(TRAIN, *small, *STEP, *overrides, f"out={out}")
            assert done.returncode == 0, done.stderr
            folders[overrides] = only_run(out)
        return folders[overrides]

    return run


@pytest.mark.parametrize("layout", LAUNCH)
@pytest.mark.parametrize(
    "overrides",
    [
        ("router=temperature", "capacity=1.25"),
        (*BY_LAYER, "gradient_checkpointing=true"),
        # The first: routers of all layers share a module.
        pytest.param(("router=spectra", "optimizer=adamw"), marks=pytest.mark.long),
        pytest.param(
            ("router=chain_of_experts", "model.expert=swiglu", "gradient_checkpointing=true"), marks=pytest.mark.long
        ),
    ],
    ids=lambda words: words[0].removeprefix("router="),
)
def test_a_run_on_two_ranks_equals_a_run_on_one_except_for_rounding(
    layout: str, overrides: tuple[str, ...], small: list[str], train_on_one_process: Any, tmp_path: Path
) -> None:
    if layout != "experts":  # not with expert_parallel, where each rank draws other random numbers for its experts
        overrides = (*overrides, "model.dropout=0.1")
    one = train_on_one_process(*overrides)
    done = run_command([*LAUNCH[layout], *small, *STEP, *overrides, f"out={tmp_path}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step ") == 3  # only one rank prints
    two = only_run(tmp_path)
    assert json.loads((two / "run.json").read_text())["facts"]["ranks"] == {"number": 2, "layout": layout}

    weights, expected = (load_file(run / "model/model.safetensors") for run in (two, one))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        difference, norm = (weights[name] - weight).double().norm(), weight.double().norm()
        assert difference <= 1e-3 * norm + 1e-6, name
    assert max(differences(untimed(two), untimed(one))) < 1e-2
    if layout != "sharded":  # before the first update, all passes compute the same; FSDP adds in another order
        names = {"eval": "val/loss", "train": "train/loss"}
        before = [[event[names[event["kind"]]] for event in untimed(run)[:2]] for run in (two, one)]
        assert before[0] == before[1]
    first_two, first = (next(e for e in untimed(run) if e["kind"] == "train") for run in (two, one))
    count_metrics = [
        key for key in first if any(word in key for word in ("load_cv", "load_gini", "drop_rate", "overlap", "flops"))
    ]
    assert count_metrics
    # These metrics are computed from counts. At the first step no weight has changed yet, so the counts are equal.
    assert all(first_two[key] == pytest.approx(first[key], rel=1e-12) for key in count_metrics)
    MoEForCausalLM.from_pretrained(two / "model")
    assert (two / "trace/step-00000006.npz").exists()


@pytest.mark.parametrize("layout", LAUNCH)
@pytest.mark.parametrize(
    "router",
    [name if name == "hash" else pytest.param(name, marks=pytest.mark.long) for name in complete("router")],
)
def test_every_router_trains_on_two_ranks_as_on_one(
    router: str, layout: str, small: list[str], train_on_one_process: Any, tmp_path: Path
) -> None:
    """Two steps on two ranks end with the weights of one rank, up to rounding: no buffer or loss is left behind."""
    [cell] = read_cells([f"router={router}"]) or []
    inapplicable = [f"{word.split('=')[0]}=0.0" for word in STEP if word.split("=")[0] in cell.ignored]
    overrides = (f"router={router}", *inapplicable, "steps=2", "eval_every=2")
    one = train_on_one_process(*overrides)
    done = train_on_two_ranks(layout, *small, *STEP, *overrides, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["facts"]["ranks"] == {
        "number": 2,
        "layout": layout,
    }
    weights, expected = (load_file(run / "model/model.safetensors") for run in (only_run(tmp_path), one))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert (weights[name] - weight).double().norm() <= 1e-3 * weight.double().norm() + 1e-6, name


def test_a_run_on_two_replicated_ranks_has_bitwise_the_weights_of_a_run_on_one(
    small: list[str], train_on_one_process: Any, tmp_path: Path
) -> None:
    """A run on two replicated ranks ends with bitwise the weights of a run on one rank.

    The sum of two numbers does not depend on their order. With more ranks, the order of additions changes the last
    bits.
    """
    overrides = ("router=topk", "grad_accum=2", "model.dropout=0.1")
    done = train_on_two_ranks("replicated", *small, *STEP, *overrides, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    one, two = (run / "model/model.safetensors" for run in (train_on_one_process(*overrides), only_run(tmp_path)))
    assert sha256(one) == sha256(two)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("replicated", ("adapter=lora_attention", "adapter.parts=[attention,experts]")),
        *((layout, ("adapter=perft_r", "adapter.router.k=2")) for layout in LAUNCH),
        ("experts", ("adapter=perft_e",)),
        ("replicated", ("adapter=lora_experts", *BY_LAYER)),
        ("experts", ("adapter=perft_e", *BY_LAYER)),
    ],
)
def test_an_adapter_on_two_ranks_equals_one_on_one_except_for_rounding(
    layout: str, words: tuple[str, ...], small: list[str], train_on_one_process: Any, tmp_path: Path
) -> None:
    one = train_on_one_process(*words, "steps=2", "eval_every=2")
    done = train_on_two_ranks(layout, *small, *STEP, *words, "steps=2", "eval_every=2", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors" if "lora" in words[0] else "adapter/adapter.safetensors"
    for file in (name, "model/model.safetensors"):
        weights, expected = (load_file(run / file) for run in (only_run(tmp_path), one))
        assert weights.keys() == expected.keys()
        for key, weight in expected.items():
            assert (weights[key] - weight).double().norm() <= 1e-3 * weight.double().norm() + 1e-6, key


@pytest.mark.parametrize("trainable", ["experts", "router"])
@pytest.mark.parametrize("layout", LAUNCH)
def test_frozen_parts_on_two_ranks_stay_and_the_others_train_as_on_one(
    layout: str, trainable: str, small: list[str], train_on_one_process: Any, tmp_path: Path
) -> None:
    words = (f"trainable={trainable}", "steps=2", "eval_every=2")
    one = load_file(train_on_one_process(*words) / "model/model.safetensors")
    done = train_on_two_ranks(layout, *small, *STEP, *words, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    weights = load_file(only_run(tmp_path) / "model/model.safetensors")
    for name, weight in one.items():
        trains = f".{trainable}." in name
        tolerance = 1e-3 * weight.double().norm() + 1e-6 if trains else 0
        assert (weights[name] - weight).double().norm() <= tolerance, name


def test_lora_is_refused_where_ranks_have_parts_of_weights(small: list[str], tmp_path: Path) -> None:
    done = run_command([*LAUNCH["experts"], *small, *STEP, "adapter=lora_experts", f"out={tmp_path}"])
    assert done.returncode != 0
    assert "each rank has a part of each weight" in done.stderr


def test_a_sweep_on_two_ranks_skips_finished_cells(small: list[str], tmp_path: Path) -> None:
    words = [*LAUNCH["replicated"], "-m", *small, *STEP, "seed=1,2", "steps=2", f"out={tmp_path}"]
    done = run_command(words)
    assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.glob("*/*/run.json"))
    assert len(runs) == 2
    before = [path.stat().st_mtime_ns for path in runs]
    repeated = run_command(words)
    assert repeated.returncode == 0, repeated.stderr
    assert repeated.stdout.count("skipped") == 2
    assert [path.stat().st_mtime_ns for path in runs] == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["grad_accum=3"], "grad_accum=3: must be a multiple of the 2 processes of this launch"),
        (["expert_parallel=true", "model.num_experts=5"], "model.num_experts=5: must be a multiple of the 2 processes"),
        (["-m", "seed=1,2", "hydra/launcher=joblib"], "hydra/launcher=joblib: must be basic"),
    ],
)
def test_settings_that_do_not_fit_the_number_of_ranks_are_refused_before_the_first_run(
    words: list[str], line: str, small: list[str], tmp_path: Path
) -> None:
    done = run_command(
        [*LAUNCH["replicated"], *sorted([*small, *STEP, *words], key="-m".__ne__), f"out={tmp_path}/runs"]
    )
    assert done.returncode != 0
    errors = [each for each in done.stderr.splitlines() if each.startswith("train.py: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert not (tmp_path / "runs").exists()


# ---- Experts on several ranks, compared with one process that has all experts -------------------------------------


def linear_experts(stack: Tensor) -> Any:
    """Return a function that multiplies the rows of each expert by that expert's matrix."""
    return lambda rows, counts: torch.cat(
        [part @ matrix.T for part, matrix in zip(rows.split(counts.tolist()), stack, strict=True)]
    )


def compare_with_all_experts(rank: int, store: str) -> None:
    """Compare outputs and gradients of experts on three ranks with those of one process. Runs on each rank.

    `store` is the path of the file by which the ranks find each other.
    """
    number_of_ranks, experts, dim = 3, 6, 4
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number_of_ranks)
    stack = torch.randn(experts, dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    local = stack[2 * rank : 2 * rank + 2].clone().requires_grad_()
    for case in range(4):
        batches = []
        for each in range(number_of_ranks):  # every rank also generates the rows of the others
            generator = torch.Generator().manual_seed(10 * case + each)
            counts = torch.randint(0, 4, (experts,), generator=generator)
            if case == 1 or (case == 2 and each == 1):
                counts[2:] = 0  # the experts of some ranks, or of all ranks but one, get no rows
            if case == 3:
                counts[:] = 0
            rows = torch.randn(int(counts.sum()), dim, dtype=torch.float64, generator=generator)
            batches.append((rows, counts))
        rows, counts = batches[rank]
        rows.requires_grad_()
        all_experts = stack.clone().requires_grad_()
        expected = [linear_experts(all_experts)(*batch) for batch in batches]
        outputs = run_distributed_experts(rows, counts, linear_experts(local))
        torch.testing.assert_close(outputs, expected[rank])
        [found_gradient] = torch.autograd.grad(outputs.square().sum(), rows, retain_graph=True)
        [expected_gradient] = torch.autograd.grad(expected[rank].square().sum(), rows, retain_graph=True)
        torch.testing.assert_close(found_gradient, expected_gradient)
        gradient = torch.autograd.grad(outputs.square().sum(), local)[0]
        all_gradients = torch.autograd.grad(sum(part.square().sum() for part in expected), all_experts)[0]
        torch.testing.assert_close(gradient, all_gradients[2 * rank : 2 * rank + 2])
    dist.destroy_process_group()


def test_experts_on_several_ranks_give_the_same_outputs_and_gradients_as_on_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare_with_all_experts, args=(str(tmp_path / "store"),), nprocs=3)


def test_a_single_process_counts_as_one_rank_and_reductions_change_nothing() -> None:
    assert (ranks.world_size(), ranks.rank(), ranks.broadcast("x"), ranks.all_reduce_max(3)) == (1, 0, "x", 3)
    tensors = [torch.tensor([1.0, math.nan]), torch.arange(3)]
    assert all(torch.equal(a, b) or a is b for a, b in zip(ranks.all_reduce_sum(tensors), tensors, strict=True))
    assert ranks.sum_of_lower_ranks(torch.arange(3)).tolist() == [0, 0, 0]
