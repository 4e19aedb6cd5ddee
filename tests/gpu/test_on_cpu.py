"""Tests without a GPU of what the tests on a GPU share, so that they do not fall behind the code."""

from collections.abc import Callable

import pytest
import torch
from test_gpu import LOSSES, accepted, first_pass

from moe.config.cell import Cell
from moe.routing.decision import Knobs
from moe.training.graphs import Graphs
from moe.training.optim import Muon
from moe.training.setup import set_up
from moe.training.step import accumulate_gradients, micro_batches


def test_the_pass_that_gpu_tests_compare_runs_on_a_cpu(cell: Callable[..., Cell]) -> None:
    config = cell("router=topk", "capacity=0.75", "output_orthogonality=0.01").config
    loss, aux, gradients = first_pass(config, "cpu")
    assert loss > 0
    assert aux["output_orthogonality"].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert torch.stack([gradient.norm() for gradient in gradients.values()]).max() > 0


def test_settings_that_a_router_ignores_are_left_out(cell: Callable[..., Cell]) -> None:
    config = accepted(cell, "switch", "capacity=0.75", *LOSSES).config
    assert (config.capacity, config.lb, config.output_orthogonality) == (0.75, 0.01, 0.0)


def test_batches_made_ahead_are_used_once(cell: Callable[..., Cell]) -> None:
    training = set_up(cell("router=topk").config)
    batches = micro_batches(training.config, training.data, 3)
    training.ahead[0] = batches
    knobs = Knobs.of()
    for step in (0, 3):
        _, last = accumulate_gradients(training, step, knobs)
        assert torch.equal(last.ids, batches[-1].ids)
    assert not training.ahead
    _, last = accumulate_gradients(training, 0, knobs)
    assert not torch.equal(last.ids, batches[-1].ids)


class Pretended:
    """A CUDA graph on a CPU: while it is recorded nothing changes, and a replay runs what was recorded."""

    def __init__(self, muon: Muon) -> None:
        self.muon, self.replays = muon, 0

    def __enter__(self) -> None:
        self.before = {p: p.detach().clone() for p in self.tensors()}

    def __exit__(self, *_: object) -> None:
        for tensor, value in self.before.items():
            tensor.detach().copy_(value)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.muon.state, *(state["momentum"] for state in self.muon.state.values())]

    def replay(self) -> None:
        self.replays += 1
        self.muon.update()


def test_an_update_is_recorded_once_and_anew_where_a_gradient_lies_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates are read in each step, and the weights are those of steps without a graph."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 8, 16), torch.randn(16, 8)]
    both = [[torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2)]
    recorded, other = (Muon(params, lr=0.1, expert_step="gradient") for params in both)
    graphs, made = Graphs.__new__(Graphs), list[Pretended]()
    vars(graphs).update(obstacle=None, update_places=(), update_graph=None, pool=None, stream=None)

    def make() -> Pretended:
        made.append(Pretended(recorded))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    gradients = [torch.empty_like(weight) for weight in weights]
    for step in range(8):
        if step == 4:
            gradients[0] = torch.empty_like(gradients[0])  # the one before is still alive, so this lies elsewhere
        for optimizer in (recorded, other):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for gradient, *params in zip(gradients, *both, strict=True):
            gradient.normal_()
            for p in params:
                p.grad = gradient
        graphs.step(recorded)
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)), step
    assert [each.replays for each in made] == [2, 3]  # not in steps 0 (no momenta), 1 (new momenta) and 4


def test_an_update_whose_weights_decay_is_not_recorded() -> None:
    p = torch.nn.Parameter(torch.ones(4, 4))
    assert Muon([p], lr=0.1).recordable
    assert not Muon([p], lr=0.1, weight_decay=0.01).recordable
