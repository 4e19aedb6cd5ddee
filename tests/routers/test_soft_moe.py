"""Soft MoE against loops over slots and tokens."""

import torch
from torch import nn

from moe.config.schema import ModelConfig
from moe.model.cost import count_parameters, flops_per_token
from moe.model.decoder import MoEConfig, MoEForCausalLM
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.soft_moe import SoftMoE
from moe.routing.decision import Context, Knobs

B, S, D, E, N = 2, 6, 8, 3, 2


def layer() -> MoELayer:
    torch.manual_seed(0)
    made = MoELayer(SoftMoE(D, E, slots=N), Experts(E, D, hidden=5, kind="silu"))
    for p in made.parameters():
        nn.init.normal_(p, std=0.7)
    return made


def context() -> Context:
    return Context(torch.zeros(B, S, dtype=torch.long), Knobs.of())


def test_slot_by_slot_and_token_by_token() -> None:
    """Equations 1-3 of the paper, one softmax at a time."""
    made, x = layer(), torch.randn(B, S, D)
    router = made.router
    y = made(x, context()).y
    for b in range(B):
        logits = torch.empty(S, E * N)
        for s in range(S):
            for m in range(E * N):
                cosine = torch.cosine_similarity(x[b, s], router.weight[m], dim=0)
                logits[s, m] = router.scale * cosine
        out = []
        for m in range(E * N):
            mixture = sum(torch.softmax(logits[:, m], 0)[s] * x[b, s] for s in range(S))
            out.append(made.experts._expert(mixture[None], None, made.experts.up[m // N], made.experts.down[m // N])[0])
        for s in range(S):
            expected = sum(torch.softmax(logits[s], 0)[m] * out[m] for m in range(E * N))
            torch.testing.assert_close(y[b, s], expected, atol=1e-5, rtol=1e-4)


def test_sequences_do_not_mix_and_tokens_of_one_do() -> None:
    made, x = layer(), torch.randn(B, S, D)
    changed = x.clone()
    changed[1, -1] += 1
    before, after = made(x, context()).y, made(changed, context()).y
    torch.testing.assert_close(before[0], after[0])
    assert (before[1, 0] - after[1, 0]).abs().max() > 1e-4


def test_probabilities_are_what_a_token_takes_of_each_experts_slots() -> None:
    made = layer()
    routing = made.router(torch.randn(B * S, D), context())
    assert routing.slots is not None
    expected = routing.slots.combine.reshape(B * S, E, N).sum(-1)
    torch.testing.assert_close(routing.probs, expected)
    torch.testing.assert_close(routing.slots.dispatch.sum(-1), torch.ones(B, E * N))


def test_what_it_has_no_value_for_is_null_and_its_load_is_even() -> None:
    stats = layer()(torch.randn(B, S, D), context()).stats
    assert stats.offered.tolist() == [B * N] * E
    for field in (stats.coactivation, stats.repeated, stats.unrouted, stats.top_k_mass, stats.entropy_t1):
        assert field.isnan().all()


def test_its_cost_is_that_of_as_many_experts_as_it_has_slots_for_a_token_and_the_mixing() -> None:
    model = ModelConfig(dim=D, heads=2, layers=1, ffn=5, num_experts=E, dense_ffn=8)

    def made(router: dict[str, object]) -> MoEForCausalLM:
        return MoEForCausalLM(MoEConfig.of(model, router, vocab_size=17, seq_len=S))

    soft = made({"_target_": "moe.routers.soft_moe.SoftMoE", "slots": N})
    top1 = made({"_target_": "moe.routers.topk.TopK", "k": 1})
    experts = 2 * 2 * D * 5 * (E * N / S - 1)  # one expert a token here, as for top-1
    router = 2 * D * (E * N - E)
    assert flops_per_token(soft, S) - flops_per_token(top1, S) == experts + router + 4 * D * E * N
    assert count_parameters(soft).active == count_parameters(soft).total
