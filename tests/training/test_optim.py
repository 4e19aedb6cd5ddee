"""Tests of Muon on stacks of matrices, against torch's Muon on each matrix, and of the learning-rate schedule."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config.sections import OptimizerConfig
from moe.model.architecture import MoEConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.routers.base import Role
from moe.routers.cosine import CosineRouter
from moe.training import optim
from moe.training.optim import Muon, build_optimizers, learning_rate_scale, orthogonalize


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_muon_updates_a_stack_like_torchs_muon_updates_each_of_its_matrices(
    nesterov: bool, shape: tuple[int, int]
) -> None:
    """Muon updates each matrix of a stack like torch's Muon updates the same matrix.

    Three steps are compared, so that momentum matters. If the stack were flattened, the experts would be mixed.
    """
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.randn(3, *shape, generator=generator))
    slices = [nn.Parameter(stack[e].detach().clone()) for e in range(3)]
    stacked = Muon([stack], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.3)
    reference = torch.optim.Muon(slices, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.3)
    for _ in range(3):
        gradient = torch.randn(3, *shape, generator=generator)
        stack.grad = gradient.clone()
        for e, p in enumerate(slices):
            p.grad = gradient[e].clone()
        stacked.step()
        reference.step()
    # The tolerance is that of torch's Muon, which iterates in bf16.
    torch.testing.assert_close(stack, torch.stack(list(slices)), rtol=0, atol=4e-3)
    assert not torch.allclose(stack, torch.stack(list(slices)) + 0.02, atol=4e-3)


def test_a_matrix_is_updated_the_same_with_and_without_a_stack_of_equal_shape() -> None:
    matrix, stack = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(2, 8, 8))
    matrix.grad, stack.grad = torch.randn(8, 8), torch.randn(2, 8, 8)
    same_matrix = nn.Parameter(torch.zeros(8, 8))
    same_matrix.grad = matrix.grad.clone()
    Muon([matrix, stack], lr=1.0).step()
    Muon([same_matrix], lr=1.0).step()
    torch.testing.assert_close(matrix, same_matrix, rtol=0, atol=1e-2)


def test_every_matrix_of_a_stack_is_orthogonalized_by_itself() -> None:
    scales = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    singular = torch.linalg.svdvals(orthogonalize(scales * torch.randn(3, 32, 64)).float())
    assert singular.min() > 0.4
    assert singular.max() < 1.3


@pytest.mark.parametrize("shape", [(32, 32), (32, 47), (32, 48), (64, 32), (32, 128)])
@pytest.mark.parametrize("kind", ["random", "rank one", "ill-conditioned", "zero"])
def test_orthogonalize_agrees_with_its_definition_in_double_precision(shape: tuple[int, int], kind: str) -> None:
    """The result agrees with the definition for both ways to compute it.

    If one side of a matrix is at least 1.5 times as long as the other, the iteration runs on the Gram matrix.
    """
    generator = torch.Generator().manual_seed(1)
    u, s, v = torch.linalg.svd(torch.randn(3, *shape, generator=generator, dtype=torch.float64), full_matrices=False)
    spectrum = {"random": s, "rank one": s * (torch.arange(32) == 0), "zero": 0 * s}
    spectrum["ill-conditioned"] = torch.logspace(0, -6, 32).double().expand_as(s)
    gradients = ((u * spectrum[kind][:, None]) @ v).float()
    x = gradients.double()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    error = (orthogonalize(gradients) - x).norm(dim=(-2, -1))
    assert (error <= 1e-3 * x.norm(dim=(-2, -1))).all()
    one_at_a_time = torch.cat([orthogonalize(gradient[None]) for gradient in gradients])
    torch.testing.assert_close(one_at_a_time, orthogonalize(gradients), rtol=0, atol=1e-6)


def test_a_cpu_orthogonalizes_in_full_fp32_whatever_the_precision_of_other_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `matmul_precision=medium` a processor with bf16 instructions would round, which Gram matrices amplify."""
    iterate, found = optim._orthogonalize, []

    def recorded(*arguments: Any) -> Tensor:
        found.append(torch.get_float32_matmul_precision())
        return iterate(*arguments)

    gradients = torch.randn(2, 64, 128)
    expected = orthogonalize(gradients)
    monkeypatch.setattr(optim, "_orthogonalize", recorded)
    torch.set_float32_matmul_precision("medium")
    try:
        result = orthogonalize(gradients)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found == ["highest"]
    assert torch.equal(result, expected)


def test_orthogonalize_splits_what_exceeds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(7, 12, 20)
    whole = orthogonalize(stack)
    monkeypatch.setattr(optim, "CACHED", 4 * 12 * 20 * 3)
    torch.testing.assert_close(orthogonalize(stack), whole, rtol=0, atol=1e-6)


def test_the_momentum_buffer_of_a_bf16_weight_holds_the_gradient() -> None:
    """With momentum 0, the momentum buffer equals the gradient after a step.

    An iteration in place, on the buffer itself, would overwrite it.
    """
    p = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    optimizer = Muon([p], lr=0.1, momentum=0.0, nesterov=False)
    p.grad = 10 * torch.randn(8, 8).bfloat16()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], p.grad)


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, apart from views. A GPU starts a kernel for each of them, or a few."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("expert_step", ["equal", "gradient"])
@pytest.mark.parametrize("shape", [(16, 16), (4, 16, 8)])
def test_muon_runs_as_many_operators_for_ten_parameters_of_a_shape_as_for_two(
    shape: tuple[int, ...], expert_step: str
) -> None:
    numbers = []
    for count in (2, 10):
        params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
        muon = Muon(params, lr=0.1, expert_step=expert_step)
        for p in params:
            p.grad = torch.randn(shape)
        muon.step()  # creates the momenta
        with Operators() as operators:
            muon.step()
        numbers.append(operators.number)
    assert numbers[0] == numbers[1] <= 90


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"not shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_the_learning_rate_rises_in_the_warmup_and_then_falls_to_its_floor() -> None:
    """The learning rate rises during the warmup and then falls, to its floor at the last optimizer step.

    The source studies advanced a scheduler meant for micro-batches once per optimizer step. Their learning rate
    therefore ended at 0.905 of its peak.
    """
    curve = [learning_rate_scale(step, steps=100, warmup=0.1, floor=0.1) for step in range(100)]
    assert curve[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert curve[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(curve[10:]))
    assert curve[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_positive_learning_rate(steps: int) -> None:
    assert all(0 < learning_rate_scale(s, steps=steps, warmup=0.1, floor=0.1) <= 1 for s in range(steps))


def steps_of_experts(expert_step: str, *, decay: float = 0.0, steps: int = 30) -> Tensor:
    """Return how far Muon moves each of four experts in its last step (4).

    Expert 1 gets a gradient in the first ten steps only, and expert 2 a thousandth of the gradient of the others.
    """
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.randn(4, 16, 12, generator=generator))
    muon = Muon([stack], lr=0.02, momentum=0.95, weight_decay=decay, expert_step=expert_step)
    for step in range(steps):
        stack.grad = (
            torch.randn(4, 16, 12, generator=generator) * torch.tensor([1.0, step < 10, 1e-3, 1.0])[:, None, None]
        )
        before, momentum = stack.detach().clone(), muon.state[stack].get("momentum", torch.zeros(4))[1].clone()
        muon.step()
    assert torch.equal(muon.state[stack]["momentum"][1], momentum), "an idle expert keeps its momentum"
    return (stack.detach() - before).flatten(1).norm(dim=1)


def test_muon_leaves_an_expert_without_a_gradient_alone() -> None:
    """An expert whose gradient is exactly 0 does not move, decay or lose momentum; the others all move alike."""
    moved = steps_of_experts("equal", decay=0.1)
    assert moved[1] == 0
    assert moved[2].item() == pytest.approx(moved[0].item(), rel=0.2)


def test_muon_can_move_an_expert_less_if_its_gradient_is_smaller() -> None:
    moved = steps_of_experts("gradient")
    assert moved[1] == 0
    assert 0 < moved[2] < 0.01 * moved[0]
    assert moved[3] > 0.5 * steps_of_experts("equal")[3]


def test_an_idle_expert_does_not_change_the_steps_of_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    both, alone = nn.Parameter(torch.ones(2, 6, 8)), nn.Parameter(torch.ones(1, 6, 8))
    optimizers = [Muon([p], lr=0.1) for p in (both, alone)]
    for _ in range(3):
        gradient = torch.randn(1, 6, 8, generator=generator)
        both.grad, alone.grad = torch.cat([gradient, torch.zeros_like(gradient)]), gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-6)
    assert torch.equal(both[1], torch.ones(6, 8))


@pytest.mark.parametrize(("muon_lr", "router_lr"), [(0.02, None), (None, None), (0.02, 0.003), (None, 0.003)])
def test_parameters_are_grouped_by_the_role_that_routers_declare(
    muon_lr: float | None, router_lr: float | None
) -> None:
    """A router's matrices go to Muon whatever their names, and its vectors and numbers are not decayed.

    With a rate of their own, AdamW trains routers, and all else is as without it.
    """

    class Declaring(CosineRouter):
        def role(self, name: str, p: nn.Parameter) -> Role:
            return "other" if name == "projection" else super().role(name, p)

    config = MoEConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
        intermediate_size=8, num_experts=4, tie_word_embeddings=False,
        router={"_target_": "moe.routers.cosine.CosineRouter"},
    )  # fmt: skip
    model = MoEForCausalLM(config)
    model.moe_layers[0].router.__class__ = Declaring
    settings = OptimizerConfig(muon_lr=muon_lr, adamw_lr=0.01, router_lr=router_lr, weight_decay=0.1)
    optimizers = build_optimizers(model, settings)
    names = {p: name.split("layers.0.")[-1] for name, p in model.named_parameters()}
    found = {
        names[p]: "muon" if isinstance(optimizer, Muon) else group["weight_decay"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    matrix = "muon" if muon_lr else 0.1
    assert found == {
        "model.embed_tokens.weight": 0.1,
        "lm_head.weight": 0.1,
        "model.norm.weight": 0.1,
        "input_layernorm.weight": 0.1,
        "post_attention_layernorm.weight": 0.1,
        **{f"self_attn.{each}_proj.weight": matrix for each in "qkvo"},
        **{f"mlp.experts.{each}": matrix for each in ("up", "down")},
        "mlp.router.projection": 0.1,
        "mlp.router.embedding": 0.1 if router_lr else matrix,
        "mlp.router.log_tau": 0.0,
    }
    rates = {
        names[p]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    assert {rate for name, rate in rates.items() if "router" not in name} == {muon_lr or 0.01, 0.01}
    others = {rate for name, rate in rates.items() if "router" in name}
    assert others == ({router_lr} if router_lr else {muon_lr or 0.01, 0.01})
