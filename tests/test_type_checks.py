"""Tests of how types and shapes are checked in the tests: no wrong one is let through."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import beartype
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor
from type_checks import jaxtyped

from moe.results.conditions import levels
from moe.routing.losses import router_entropy

check = jaxtyped(typechecker=beartype.beartype)
WRONG = (BeartypeCallHintViolation, TypeCheckError)


@check
def half(number: int) -> int:
    return number / 2 if number % 2 else number // 2  # type: ignore[return-value]


@check
def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m k"], wrong: bool = False) -> Float[Tensor, "n k"]:
    return (a @ b).T if wrong else a @ b


@check
def both(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    product(torch.ones(5, 2), torch.ones(2, 7))  # its n is not this n
    return a.sum() + b.sum()


@check
def numbers(last: int) -> Iterator[int]:
    yield from range(last)


@check
@dataclass
class Named:
    name: str
    next: "Named | None" = None


def test_what_fits_is_accepted() -> None:
    assert half(4) == 2
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert both(torch.ones(2), torch.ones(3)) == 5
    assert list(numbers(3)) == [0, 1, 2]
    assert Named("a", Named("b")).next == Named("b")


@pytest.mark.parametrize(
    "call",
    [
        lambda: half("4"),
        lambda: half(3),
        lambda: product(torch.ones(2, 3), torch.ones(4, 3)),
        lambda: product(torch.ones(2, 3), torch.ones(3, 4).long()),
        lambda: product(torch.ones(2, 3), torch.ones(3, 4), wrong=True),
        lambda: numbers("3"),
        lambda: Named(3),
        lambda: levels([1, 2]),
        lambda: router_entropy(torch.ones(3)),
    ],
    ids=["argument", "result", "shape", "type", "shape of a result", "generator", "dataclass", "moe", "shape in moe"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(WRONG):
        call()
