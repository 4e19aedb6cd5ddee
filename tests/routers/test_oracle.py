"""Tests of oracle routing: which experts a domain has, that labels alone open them, and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import run
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.data.blocks import batch
from moe.launch.command_line import read_cells
from moe.routers.oracle import Oracle
from moe.routers.topk import TopK
from moe.routing.decision import LABELS, Context, Knobs, Routing, TrainingText
from moe.training.evaluate import evaluate
from moe.training.setup import model_of_run, prepare_data, set_up

D = 6


def make(experts: int, domains: int, **settings: Any) -> Oracle:
    router = Oracle(D, experts, **settings)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.before_training(TrainingText(torch.zeros(1, dtype=torch.long), tuple(f"d{n}" for n in range(domains))))
    return router


def route(router: Oracle, x: Tensor, labels: list[int]) -> Routing:
    """Route sequences of two tokens, with one label for each sequence."""
    told = torch.tensor(labels)[:, None].expand(-1, len(LABELS))
    return router(x, Context(torch.zeros(len(labels), 2, dtype=torch.long), Knobs.of(), told=told))


@pytest.mark.parametrize(("experts", "domains"), [(8, 4), (8, 7), (9, 2), (5, 5), (16, 3)])
def test_domains_share_out_all_experts_in_order_and_as_evenly_as_possible(experts: int, domains: int) -> None:
    owner = make(experts, domains).owner.tolist()
    sizes = [owner.count(domain) for domain in range(domains)]
    assert owner == sorted(owner)
    assert sum(sizes) == experts
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == experts // domains


@pytest.mark.parametrize("k", [1, 2])
def test_a_token_takes_what_top_k_of_its_domains_experts_takes(k: int) -> None:
    """The reference is a `TopK` with the rows of one domain alone."""
    router, labels, x = make(8, 2, k=k), [0, 1, 1], torch.randn(6, D)
    routing = route(router, x, labels)
    for t in range(6):
        domain = labels[t // 2]
        part = TopK(D, 4, k=k)
        part.weight = nn.Parameter(router.weight[4 * domain : 4 * domain + 4])
        expected = part(x[t : t + 1], Context(torch.zeros(1, 1, dtype=torch.long), Knobs.of()))
        own = routing.token == t
        assert torch.equal(routing.expert[own], expected.expert + 4 * domain)
        torch.testing.assert_close(routing.weight[own], expected.weight)
        assert routing.probs is not None
        padded = F.pad(expected.probs[0], (4 * domain, 4 - 4 * domain))
        torch.testing.assert_close(routing.probs[t], padded)


def test_with_k_experts_for_each_domain_the_label_alone_decides() -> None:
    router = make(6, 3, k=2)
    for x in (torch.randn(6, D), torch.randn(6, D)):
        experts = route(router, x, [2, 0, 1]).expert.view(3, 4).tolist()
        assert [set(each) for each in experts] == [{4, 5}, {0, 1}, {2, 3}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["router.k=2", "model.num_experts=3"],
            r"^router.k=2: must be at most 1: some of the 2 domains have 1 of the 3 experts$",
        ),
        (["model.num_experts=1"], r"^model.num_experts=1: must be at least 2, for speech, math$"),
    ],
)
def test_too_few_experts_are_refused_before_the_text_is_read(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_cells(["data.source.domains=[speech,math]", "router=oracle", *words])


def test_a_text_of_one_domain_is_refused(cell: Any) -> None:
    message = r"^router.label=domain: the text has one domain \(speech\); an oracle needs two or more$"
    with pytest.raises(ConfigError, match=message):
        read_cells(["data.source.domains=[speech]", "router=oracle"])
    config = cell("router=shuffled_oracle", "data.source.domain=null").config  # its text has to be read to know that
    with pytest.raises(ConfigError, match=r"^router.label=shuffled_domain: the text has one domain"):
        set_up(config)


@pytest.mark.parametrize("router", ["oracle", "shuffled_oracle"])
def test_a_trained_oracle_routes_each_validation_text_by_its_label(cell: Any, router: str) -> None:
    """The experts of a block are those of its label, also of a model that was saved and loaded.

    With one expert for each domain, mutual information of the true label and the expert is full for the oracle.
    """
    one = cell(f"router={router}", "model.num_experts=2", "lb=0", "steps=2")
    run(one)
    data, model = prepare_data(one.config), model_of_run(one.folder, one.config)
    blocks = batch(data.val, range(len(data.val)))
    label = {"oracle": "domain", "shuffled_oracle": "shuffled_domain"}[router]
    assert blocks.told is not None
    expected = blocks.told[:, LABELS.index(label)].repeat_interleave(blocks.ids.shape[1])
    output = model(**blocks.inputs)
    assert all(torch.equal(layer[0].expert, expected) for layer in output.routing)
    with pytest.raises(ConfigError, match=rf"^told: must have the {label} of each text, because Oracle routes by it$"):
        model(blocks.ids)
    text = {"domains": data.domains, "text_bytes": data.predicted_bytes("val")}
    values = evaluate(model, data.val, **text, batch_size=4, temperature=1.0)
    assert values["routing/load_cv"] == pytest.approx(
        expected.bincount().double().std(correction=0) / len(expected) * 2
    )


def test_a_model_generates_with_the_label_of_its_prompt(cell: Any) -> None:
    """With a cache, which sees one token at a time, as without."""
    one = cell("router=oracle", "model.num_experts=4", "steps=1")
    run(one)
    model = model_of_run(one.folder, one.config)
    prompt, told = torch.randint(0, 100, (2, 5)), torch.tensor([[0, 0], [1, 0]])
    kept: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(prompt, told=told, use_cache=cache, **kept) for cache in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 9)
