"""Tests of Soft MoE against loops over slots and tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from moe.config.model import ModelConfig
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.cost import count_parameters, flops_per_token
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.soft_moe import SoftMoE
from moe.routing.decision import Context, Knobs

B, S, D, E, N = 2, 6, 8, 3, 2


def make_layer() -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(SoftMoE(D, E, slots=N), Experts(E, D, hidden=5, kind="silu"))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.7)
    return layer


def context() -> Context:
    return Context(torch.zeros(B, S, dtype=torch.long), Knobs.of())


def test_the_output_equals_loops_over_slots_and_tokens() -> None:
    """The layer computes equations 1-3 of the paper, which the test evaluates with one softmax at a time."""
    layer, x = make_layer(), torch.randn(B, S, D)
    router = layer.router
    y = layer(x, context()).y
    for b in range(B):
        logits = torch.empty(S, E * N)
        for s in range(S):
            for m in range(E * N):
                cosine = torch.cosine_similarity(x[b, s], router.weight[m], dim=0)
                logits[s, m] = router.scale * cosine
        out = []
        for m in range(E * N):
            mixture = sum(torch.softmax(logits[:, m], 0)[s] * x[b, s] for s in range(S))
            out.append(
                layer.experts._expert(
                    mixture[None], F.linear, None, layer.experts.up[m // N], layer.experts.down[m // N]
                )[0]
            )
        for s in range(S):
            expected = sum(torch.softmax(logits[s], 0)[m] * out[m] for m in range(E * N))
            torch.testing.assert_close(y[b, s], expected, atol=1e-5, rtol=1e-4)


def test_a_token_affects_other_tokens_of_its_sequence_but_no_other_sequence() -> None:
    layer, x = make_layer(), torch.randn(B, S, D)
    changed = x.clone()
    changed[1, -1] += 1
    before, after = layer(x, context()).y, layer(changed, context()).y
    torch.testing.assert_close(before[0], after[0])
    assert (before[1, 0] - after[1, 0]).abs().max() > 1e-4


def test_probabilities_are_the_combine_weights_summed_over_each_experts_slots() -> None:
    layer = make_layer()
    routing = layer.router(torch.randn(B * S, D), context())
    assert routing.slots is not None
    expected = routing.slots.combine.reshape(B * S, E, N).sum(-1)
    torch.testing.assert_close(routing.probs, expected)
    torch.testing.assert_close(routing.slots.dispatch.sum(-1), torch.ones(B, E * N))


def test_loads_are_equal_and_statistics_without_meaning_for_slots_are_nan() -> None:
    stats = make_layer()(torch.randn(B, S, D), context()).stats
    assert stats.offered.tolist() == [B * N] * E
    for field in (stats.coactivation, stats.repeated, stats.unrouted, stats.top_k_mass, stats.entropy_t1):
        assert field.isnan().all()


def test_flops_count_the_slots_per_token_and_the_mixing() -> None:
    model = ModelConfig(dim=D, heads=2, layers=1, ffn=5, num_experts=E, dense_ffn=8)

    def make_model(router: dict[str, object]) -> MoEForCausalLM:
        return MoEForCausalLM(MoEConfig.of(model, router, vocab_size=17, seq_len=S))

    soft = make_model({"_target_": "moe.routers.soft_moe.SoftMoE", "slots": N})
    top1 = make_model({"_target_": "moe.routers.topk.TopK", "k": 1})
    experts = 2 * 2 * D * 5 * (E * N / S - 1)  # E * N / S experts per token (here 1, as with top-1)
    router = 2 * D * (E * N - E)
    assert flops_per_token(soft, S) - flops_per_token(top1, S) == experts + router + 4 * D * E * N
    assert count_parameters(soft).active == count_parameters(soft).total
