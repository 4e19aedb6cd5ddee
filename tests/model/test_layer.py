"""Tests of the experts and of the Mixture-of-Experts layer against slow reference code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from moe.model import experts as module
from moe.model.experts import Experts, choose_kernel
from moe.model.layer import Latent, MoELayer
from moe.routers.default_moe import DefaultMoE
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs
from moe.routing.stats import RoutingStats

D, E, H = 8, 4, 12


def randomize(module: nn.Module) -> nn.Module:
    """Draw all parameters at random, always the same numbers. Return the module."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return module


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 10, 0], [10, 0, 0, 0]])
def test_experts_compute_each_row_with_the_weights_of_its_expert(kind: str, counts: list[int]) -> None:
    experts = randomize(Experts(E, D, hidden=H, kind=kind))
    x = torch.randn(10, D)
    y = experts(x, torch.tensor(counts))
    expert_of_row = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    for row, e, out in zip(x, expert_of_row, y, strict=True):
        hidden = F.silu(experts.up[e] @ row)
        if kind == "swiglu":
            hidden = F.silu(experts.gate[e] @ row) * (experts.up[e] @ row)
        torch.testing.assert_close(out, experts.down[e] @ hidden)


def test_gradients_of_experts_agree_with_finite_differences() -> None:
    experts = randomize(Experts(3, 4, hidden=5, kind="swiglu")).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: experts(rows, torch.tensor([2, 0, 4])), x)


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_all_kernels_give_the_same_output_and_gradients(
    kind: str, contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = randomize(Experts(E, D, hidden=H, kind=kind))
    results = []
    for kernel in ("loop", "grouped"):
        monkeypatch.setattr(module, "choose_kernel", lambda *_, kernel=kernel: kernel)
        x = torch.linspace(-1, 1, 10 * D).view(10, D).requires_grad_()
        y = experts(x, torch.tensor([3, 0, 5, 2]))
        y.backward(torch.linspace(0, 1, 10 * D).view(10, D) if contiguous else torch.ones(1, 1).expand(10, D))
        results.append([y.detach(), x.grad, *(p.grad for p in experts.parameters())])
        experts.zero_grad()
    assert results[1][-1].abs().sum() > 0
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(loop, grouped)


@pytest.mark.parametrize("sizes", [[32, 0, 40, 33], [3, 0, 200, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize("kernel", ["loop", "grouped"])
@pytest.mark.parametrize("kind", ["silu", "geglu"])
def test_padded_groups_change_nothing(
    sizes: list[int], kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even groups run in one batch, uneven ones by either kernel; experts without rows get gradients of exactly 0."""
    monkeypatch.setattr(
        module, "choose_kernel", lambda device, dtype, *_: kernel if dtype == torch.bfloat16 else "loop"
    )
    experts = randomize(Experts(E, D, hidden=16, kind=kind))
    assert module._batch_pays(sizes, (E, 16, D)) == (sizes[0] == 32)
    rows = torch.linspace(-1, 1, sum(sizes) * D).view(-1, D).bfloat16()
    gradient = torch.linspace(1, 2, sum(sizes) * D).view(-1, D).bfloat16()
    x = rows.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, torch.tensor(sizes))
    y.backward(gradient)
    found = [y, x.grad, *(p.grad for p in experts.parameters())]
    assert all((p[1] == 0).all() for p in found[2:])
    experts.zero_grad()
    x = rows.float().requires_grad_()
    exact = experts(x, torch.tensor(sizes))
    exact.backward(gradient.float())
    for one, other in zip(found, [exact, x.grad, *(p.grad for p in experts.parameters())], strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.02 * other.abs().max().item())


@pytest.mark.parametrize("rows", [1, 5])
def test_the_grouped_kernel_takes_rows_in_any_order_in_memory(rows: int) -> None:
    experts = randomize(Experts(2, 16, hidden=24, kind="silu")).bfloat16()
    counts = torch.tensor([rows, 0])
    x = torch.linspace(-1, 1, rows * 16).view(rows, 16).bfloat16()
    found = []
    for each in (x, x.T.contiguous().T):
        each.requires_grad_()
        y = experts(each, counts)
        y.backward(each.detach())
        found.append((y, each.grad))
    assert experts.kernel(x.dtype) == "grouped"
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_a_batch_lie_in_memory_as_the_weights_do() -> None:
    """Otherwise copying them takes as long as the products."""
    experts = randomize(Experts(E, D, hidden=16, kind="swiglu")).bfloat16()
    sizes = [32] * E
    assert module._batch_pays(sizes, (E, 16, D))
    stacks = (experts.gate, experts.up, experts.down)
    y = module.run_experts(torch.randn(sum(sizes), D).bfloat16(), torch.tensor(sizes), stacks, experts._expert)
    gradients = torch.autograd.grad(y.sum(), stacks)
    assert all(gradient.is_contiguous() for gradient in gradients)


def test_a_batch_is_padded_only_where_that_costs_less_than_separate_products() -> None:
    """Padding is limited in FLOPs for each expert that has rows, and in rows; one product cannot be joined."""
    assert module._batch_pays([600, 400], (2, 512, 128))
    assert not module._batch_pays([680, 320], (2, 512, 128))  # 180 rows of padding on average, 131,072 FLOPs each
    assert not module._batch_pays([506, 494], (2, 2048, 1024))
    assert not module._batch_pays([100] + [0] * 7, (8, 16, 8))
    assert not module._batch_pays([1, 1] + [0] * 6, (8, 16, 8))  # as in a single token
    assert module._batch_pays([16] * 60 + [0] * 4, (64, 16, 8))
    assert not module._batch_pays([16] * 20 + [0] * 44, (64, 16, 8))
    assert not module._batch_pays([600], (1, 16, 8))
    assert not module._batch_pays([0, 0], (2, 16, 8))


def test_the_grouped_kernel_works_under_autocast_and_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, outputs are bf16 and correct within its rounding of 2^-8. Gradients keep the precision of the
    weights. Without rows, the output is empty.
    """
    monkeypatch.setattr(module, "choose_kernel", lambda *_: "grouped")
    experts = randomize(Experts(64, D, hidden=16, kind="swiglu"))
    counts = torch.arange(64) % 2
    x = torch.randn(32, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, counts)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), experts(x, counts), atol=0.05 * y.abs().max().item(), rtol=0)
    y.sum().backward()
    assert experts.up.grad.dtype == torch.float32
    assert (experts.up.grad[::2] == 0).all()
    assert experts(x[:0], torch.zeros(64, dtype=torch.long)).shape == (0, D)


@pytest.mark.parametrize(
    ("device", "dtype", "stack", "expected"),
    [
        ("cpu", torch.float32, (15, 16, 8), "loop"),
        ("cpu", torch.float32, (16, 16, 8), "grouped"),
        ("cpu", torch.float32, (16, 16, 6), "loop"),  # rows of 24 bytes, not a multiple of 16
        ("cpu", torch.float64, (128, 16, 8), "loop"),
        ("cpu", torch.bfloat16, (8, 16, 8), "grouped"),
        ("cpu", torch.bfloat16, (8, 16, 6), "loop"),
        ("cuda", torch.bfloat16, (8, 16, 8), "grouped"),
        ("cuda", torch.bfloat16, (8, 16, 12), "loop"),
        ("cuda", torch.bfloat16, (1, 16, 8), "loop"),  # with one expert, both kernels run one matrix product
        ("cuda", torch.float32, (8, 16, 8), "loop"),
        ("cuda", torch.float32, (16, 16, 8), "grouped"),
    ],
)
def test_the_kernel_depends_on_device_precision_and_shape(
    device: str, dtype: torch.dtype, stack: tuple[int, ...], expected: str
) -> None:
    assert choose_kernel(device, dtype, stack) == expected


@pytest.mark.parametrize("experts", [E, 64])
def test_dropout_removes_hidden_units_in_training_only(experts: int) -> None:
    """Dropout acts on the hidden units, and only in training.

    All 64 hidden units are equal. An output, relative to the one without dropout, is therefore the share of units that
    are not removed, divided by 0.5. Its mean is 1 and its variance 1/64.
    """
    layer = Experts(experts, D, hidden=64, kind="silu", dropout=0.5)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.1)
    rows = torch.ones(4 * experts, D)
    counts = torch.full((experts,), 4)
    noisy, clean = layer(rows, counts), layer.eval()(rows, counts)
    assert clean.std() < 1e-6
    ratio = noisy[:, 0] / clean[:, 0]
    assert ratio.std() > 0.05
    assert (ratio.mean() - 1).abs() < 5 * (1 / 64 / len(rows)) ** 0.5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_layer_of_identical_experts_equals_a_dense_feed_forward(k: int) -> None:
    """A layer of identical experts computes the dense feed-forward times the sum of the gates.

    With k > 1 the renormalized gates sum to 1. With k=1 the gate is a probability below 1.
    """
    experts = randomize(Experts(E, D, hidden=H, kind="silu"))
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(p[:1].expand_as(p))
    router = randomize(TopK(D, E, k=k))
    x = torch.randn(2, 5, D)
    ids = torch.zeros(2, 5, dtype=torch.long)
    dense = F.linear(F.silu(F.linear(x, experts.up[0])), experts.down[0])
    gate = router(x.view(-1, D), Context(ids, Knobs.of())).weight.view(10, k).sum(-1).view(2, 5, 1)
    torch.testing.assert_close(MoELayer(router, experts)(x, Context(ids, Knobs.of())).y, dense * gate)
    if k > 1:
        torch.testing.assert_close(gate, torch.ones_like(gate))


def test_the_output_of_shared_experts_is_added_to_that_of_routed_experts() -> None:
    router, experts = randomize(TopK(D, E)), randomize(Experts(E, D, hidden=H, kind="silu"))
    shared = randomize(nn.Linear(D, D))
    x, context = torch.randn(2, 5, D), Context(torch.zeros(2, 5, dtype=torch.long), Knobs.of())
    routed, both = MoELayer(router, experts)(x, context), MoELayer(router, experts, shared)(x, context)
    torch.testing.assert_close(both.y, routed.y + shared(x))


def reference(layer: MoELayer, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Return the output of a layer with top-2 and all its parts, token by token."""
    rows = []
    for token, logits in zip(x, read @ layer.router.weight.T, strict=True):
        small = layer.latent.down.weight @ token
        shares, experts = logits.softmax(-1).topk(2)
        routed = sum(
            share / shares.sum() * (layer.experts.down[e] @ F.silu(layer.experts.up[e] @ small))
            for share, e in zip(shares, experts, strict=True)
        )
        always = layer.shared.down[0] @ F.silu(layer.shared.up[0] @ token)
        rows.append(layer.latent.up.weight @ routed + torch.sigmoid(layer.shared_gate.weight @ token) * always)
    return torch.stack(rows)


class Always(Experts):
    """One expert for all tokens, in the place of shared experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(-1, D), torch.tensor([x.numel() // D])).view_as(x)


def test_latent_shared_gate_and_other_input_of_the_router_equal_their_formulas() -> None:
    """The formulas are those of 2601.18089 and of transformers' nemotron_h (latent) and qwen2_moe (gate)."""
    always, gate = Always(1, D, hidden=5, kind="silu"), nn.Linear(D, 1, bias=False)
    experts, latent = Experts(E, 3, hidden=H, kind="silu"), Latent(D, 3)
    layer = MoELayer(TopK(D, E, k=2), experts, always, shared_gate=gate, latent=latent)
    randomize(layer)
    x, read = torch.randn(2, 6, D), torch.randn(2, 6, D)
    context = Context(torch.zeros(2, 6, dtype=torch.long), Knobs.of(), compared=torch.arange(4))
    for given in (x, read):
        output = layer(x, context, None if given is x else given)
        torch.testing.assert_close(output.y.view(-1, D), reference(layer, x.view(-1, D), given.view(-1, D)))
    rows = x.view(-1, D)[:4]
    outputs = torch.stack(
        [
            latent.up(F.silu(latent.down(rows) @ up.T) @ down.T)
            for up, down in zip(experts.up, experts.down, strict=True)
        ]
    )
    torch.testing.assert_close(layer.outputs_of_all(rows), outputs)
    assert layer.outputs_of_all(rows[:0]).shape == (E, 0, D)  # a micro-batch without a token to compare
    pairs = [F.cosine_similarity(outputs[i], outputs[j], dim=-1) for i in range(E) for j in range(i)]
    torch.testing.assert_close(output.stats.output_similarity, torch.stack(pairs).mean(0).sum())


def test_a_router_learns_from_outputs_in_the_width_of_hidden_states() -> None:
    layer = randomize(MoELayer(DefaultMoE(D, E, k=2), Experts(E, 3, hidden=H, kind="silu"), latent=Latent(D, 3)))
    x = torch.randn(1, 5, D)
    stats = layer(x, Context(torch.zeros(1, 5, dtype=torch.long), Knobs.of())).stats
    chosen = layer.router.weight.detach() @ x[0].T
    outputs = layer.outputs_of_all(x[0])
    sums = torch.stack(
        [outputs[e, [t for t in range(5) if e in chosen[:, t].topk(2).indices]].sum(0) for e in range(E)]
    )
    torch.testing.assert_close(stats.feedback, sums.flatten())


def test_statistics_are_detached_and_those_of_two_halves_merge_to_those_of_the_batch() -> None:
    layer = MoELayer(randomize(TopK(D, E)), randomize(Experts(E, D, hidden=H, kind="silu")))
    x, ids = torch.randn(6, 5, D), torch.zeros(6, 5, dtype=torch.long)
    full_batch = layer(x, Context(ids, Knobs.of())).stats
    halves = [layer(part, Context(ids[:3], Knobs.of())).stats for part in (x[:3], x[3:])]
    for name, merged, field in zip(RoutingStats._fields, halves[0].merge(halves[1]), full_batch, strict=True):
        assert not field.requires_grad
        if name not in ("micro_batches", "max_violation"):  # these two depend on the division into micro-batches
            torch.testing.assert_close(merged, field, equal_nan=True)


@pytest.mark.parametrize("k", [2, 3])
def test_the_layer_equals_transformers_mixtral_block(k: int) -> None:
    """With equal weights, the layer and the Mixtral block of transformers have equal outputs and input gradients."""
    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "eager"
    block = randomize(MixtralSparseMoeBlock(config))
    experts, router = Experts(E, D, hidden=H, kind="swiglu"), TopK(D, E, k=k)
    with torch.no_grad():
        gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
        experts.gate.copy_(gate)
        experts.up.copy_(up)
        experts.down.copy_(block.experts.down_proj)
        router.weight.copy_(block.gate.weight)
    x, mixtral_x = (torch.randn(2, 5, D, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    y = MoELayer(router, experts)(x.requires_grad_(), Context(torch.zeros(2, 5, dtype=torch.long), Knobs.of())).y
    reference = block(mixtral_x.requires_grad_())
    reference = reference[0] if isinstance(reference, tuple) else reference
    torch.testing.assert_close(y, reference)
    for output in (y, reference):
        output.square().sum().backward()
    torch.testing.assert_close(x.grad, mixtral_x.grad)
