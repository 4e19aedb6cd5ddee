"""The loss in chunks equals the loss from all logits: values and gradients, where and how it is asked for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.config.model import ModelConfig
from moe.data.labels import IGNORED
from moe.model import vocabulary_loss
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.vocabulary_loss import cross_entropy, linear_cross_entropy

T, D, V = 2 * vocabulary_loss.ROWS + 88, 16, 50  # three chunks, the last one shorter


def inputs(dtype: torch.dtype, *, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(V, (T,))
    targets[::7] = IGNORED
    x, weight = scale * torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), targets


def make(*, tied: bool = True) -> MoEForCausalLM:
    sizes: dict[str, Any] = {"dim": 16, "heads": 2, "layers": 1, "ffn": 32, "num_experts": 4, "dense_ffn": 64}
    router = {"_target_": "moe.routers.topk.TopK", "k": 2}
    torch.manual_seed(0)
    config = MoEConfig.of(ModelConfig(**sizes), router, vocab_size=V, seq_len=12)
    config.tie_word_embeddings = tied
    return MoEForCausalLM(config)


class Operators(TorchDispatchMode):
    """Keeps which operators run, and the shapes of all tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.shapes |= {tuple(each.shape) for each in tree_leaves(result) if isinstance(each, Tensor)}
        return result

    @property
    def products(self) -> int:
        return sum(name in ("mm", "addmm_") for name in self.names)


def test_gradients_are_those_of_the_value() -> None:
    """Finite differences in fp64, with a factor after the loss."""
    x, weight, targets = inputs(torch.float64)
    x, weight, targets = x[:9].detach().requires_grad_(), weight, targets[:9]
    assert torch.autograd.gradcheck(lambda *tensors: linear_cross_entropy(*tensors, targets) / 3, (x, weight))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_chunks_equal_the_whole_in_double_precision(scale: float) -> None:
    """Also with logits in the hundreds, whose exponentials overflow. The reference is the definition, row by row."""
    x, weight, targets = inputs(torch.float64, scale=scale)
    loss = linear_cross_entropy(x, weight, targets)
    found = torch.autograd.grad(loss, (x, weight))
    rows = [(x[i] @ weight.T).log_softmax(-1)[t] for i, t in enumerate(targets.tolist()) if t != IGNORED]
    expected = -torch.stack(rows).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for one, other in zip(found, torch.autograd.grad(expected, (x, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_gpu_differentiates_as_a_cpu_does(scale: float) -> None:
    x, weight, targets = inputs(torch.float64, scale=scale)
    logits = (x @ weight.T).detach()
    loss, gradient, factor = vocabulary_loss._on_cpu(logits.clone(), targets)
    other_loss, other, one = vocabulary_loss._on_gpu(logits, targets)
    assert other is logits, "the gradient takes the place of the logits"
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(other * one, gradient * factor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 2e-6), (True, 1e-2)])
def test_errors_are_those_of_the_whole(autocast: bool, tolerance: float) -> None:
    """Relative to double precision, errors are small, and no more than twice those of logits made at once."""
    exact = inputs(torch.float64)
    reference = linear_cross_entropy(*exact)
    truth = [reference, *torch.autograd.grad(reference, exact[:2])]
    errors = []
    for chunks in (True, False):
        x, weight, targets = inputs(torch.float64)
        x, weight = (tensor.detach().float().requires_grad_() for tensor in (x, weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole = cross_entropy(F.linear(x, weight), targets)
            loss = linear_cross_entropy(x, weight, targets) if chunks else whole
        gradients = torch.autograd.grad(loss, (x, weight))
        assert [tensor.dtype for tensor in (loss, *gradients)] == [torch.float32] * 3
        pairs = zip([loss, *gradients], truth, strict=True)
        errors.append([((one - other).norm() / other.norm()).item() for one, other in pairs])
    for one, other in zip(*errors, strict=True):
        assert one < max(2 * other, 1e-7)
        assert one < tolerance


@pytest.mark.parametrize(("trains", "products"), [("nothing", 1), ("x", 2), ("weight", 2), ("both", 3)])
def test_nothing_is_computed_for_what_does_not_train(trains: str, products: int) -> None:
    x, weight, targets = inputs(torch.float32)
    x.requires_grad_(trains in ("x", "both"))
    weight.requires_grad_(trains in ("weight", "both"))
    with Operators() as operators:
        linear_cross_entropy(x, weight, targets)
    assert operators.products == 3 * products  # in each of three chunks
    with torch.no_grad(), Operators() as operators:
        linear_cross_entropy(x, weight, targets)
    assert operators.products == 3


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_has_the_same_loss_and_gradients(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of two micro-batches add up, also in a matrix that is the embedding too."""
    monkeypatch.setattr(vocabulary_loss, "ROWS", 7)
    model = make(tied=tied).double()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.loss_kernel() == "chunks"
    ids = torch.randint(model.config.vocab_size, (2, 2, 12))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, IGNORED)
    found = []
    for loss_only in (True, False):
        model.zero_grad()
        outputs = [model(*each, loss_only=loss_only) for each in zip(ids, labels, strict=True)]
        assert [output.logits is None for output in outputs] == [loss_only] * 2
        for output in outputs:
            (output.loss / 2).backward()
        found.append([outputs[0].loss, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-7, check_dtype=False
        )  # all logits at once are in fp32


def test_no_label_has_no_loss() -> None:
    model = make()
    ids = torch.randint(model.config.vocab_size, (1, 12))
    labels = torch.full_like(ids, IGNORED)
    for loss_only in (True, False):
        assert model(ids, labels, loss_only=loss_only).loss.isnan()
        assert model(ids, labels, loss_only=loss_only, num_items_in_batch=5).loss == 0


def test_logits_of_all_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_loss, "ROWS", 8)
    model = make().train()
    ids = torch.randint(model.config.vocab_size, (2, 12))
    with Operators() as operators:
        model(ids, ids, loss_only=True).loss.backward()
    assert {shape for shape in operators.shapes if shape[-1:] == (V,)} == {(8, V), (16, V)}  # (16, V): the weights


def test_an_adapted_matrix_is_used_whole() -> None:
    model = make()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert model.loss_kernel() == "whole"
    ids = torch.randint(model.config.vocab_size, (1, 12))
    assert model(ids, ids, loss_only=True).logits is not None
