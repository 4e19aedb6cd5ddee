"""Tests of document pools: the pools against a loop, documents in one block, sizes, and padding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.document_pool import DocumentPool, document_starts
from moe.routing.decision import Context, Knobs, Routing, document_positions

B, S, D, E = 2, 9, 16, 8
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6, 7]])


def make(**settings: Any) -> DocumentPool:
    router = DocumentPool(D, E, **settings)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router.eval()


def hidden(rows: int = B * S) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(1))


def route(router: DocumentPool, x: Tensor, position: Tensor | None) -> Routing:
    sequences = 1 if position is None else len(position)
    ids = torch.zeros(sequences, len(x) // sequences, dtype=torch.long)
    documents = None if position is None else document_positions(position)
    return router(x, Context(ids, Knobs.of(), document_position=documents))


def documents(position: Tensor) -> list[list[int]]:
    """Return the numbers of the tokens of each document."""
    found: list[list[int]] = []
    for token, place in enumerate(position.flatten().tolist()):
        if place == 0:
            found.append([])
        found[-1].append(token)
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_experts_and_gates_equal_a_loop_over_documents_and_tokens(causal: bool) -> None:
    router, x = make(k=2, pool=3, causal=causal), hidden()
    routing = route(router, x, POSITIONS)
    logits = x @ router.weight.T
    probs = torch.softmax(logits.double(), -1)
    for members in documents(POSITIONS):
        for number, t in enumerate(members):
            seen = members[: number + 1] if causal else members
            pool = probs[seen].sum(0).topk(3).indices
            best = logits[t, pool].topk(2).indices
            of_token = routing.token == t
            assert routing.expert[of_token].tolist() == pool[best].tolist()
            torch.testing.assert_close(routing.weight[of_token], torch.softmax(logits[t, pool], -1)[best])


@pytest.mark.parametrize("causal", [False, True])
def test_a_document_is_routed_as_if_it_were_alone(causal: bool) -> None:
    router, x = make(causal=causal), hidden()
    routing = route(router, x, POSITIONS)
    router.require_documents_apart()  # does not raise
    for members in documents(POSITIONS):
        alone = route(router, x[members], None)
        together = torch.isin(routing.token, torch.tensor(members))
        assert alone.expert.tolist() == routing.expert[together].tolist()
        torch.testing.assert_close(alone.weight, routing.weight[together])


def test_the_experts_of_a_document_are_at_most_those_of_its_pool() -> None:
    x = hidden(60)
    assert len(route(make(pool=3), x, None).expert.unique()) <= 3
    assert len(route(make(pool=E), x, None).expert.unique()) > 3


def test_training_draws_a_size_for_each_document() -> None:
    """Ten documents of 40 tokens use pools of 2 to 5 experts, and every size occurs."""
    position = torch.arange(40).repeat(10)[None]
    router = make(pool=4, pool_min=2, pool_max=5).train()
    torch.manual_seed(0)
    sizes = set()
    for _ in range(5):
        routing = route(router, hidden(400), position)
        assert routing.probs is not None
        pools = (routing.probs > 0).view(10, 40, E)
        assert (pools == pools[:, :1]).all()
        sizes |= set(pools[:, 0].sum(-1).tolist())
    assert sizes == {2, 3, 4, 5}


def test_padding_is_in_no_document() -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    router, x = make(causal=True), hidden()
    context = Context(torch.zeros(B, S, dtype=torch.long), Knobs.of()).without_padding(mask)
    routing = router(x[mask.flatten() == 1], context)
    alone = route(router, x[3:9], None)
    first = routing.token < 6
    assert routing.expert[first].tolist() == alone.expert.tolist()


def test_a_document_starts_where_its_position_is_0() -> None:
    context = Context(torch.zeros(B, S, dtype=torch.long), Knobs.of(), document_position=POSITIONS)
    assert document_starts(context).tolist() == [[0] * 4 + [4] * 5, [0] + [1] * 8]


@pytest.mark.parametrize(
    "settings", [{"pool": 1}, {"pool": E + 1}, {"pool_min": 1}, {"pool_max": E + 1}, {"pool_min": 5, "pool_max": 4}]
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        DocumentPool(D, E, **settings)
    with pytest.raises(ConfigError, match=r"router\.pool_min=8"):
        DocumentPool(D, E, pool_min=E, pool_max=E)
