"""Measure what the routing of a layer tells about the routing of the next one, for the same tokens.

A system that loads experts from slow memory can fetch those of the next layer early, as far as they can be predicted.
"""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.metrics.agreement import overlap
from moe.model.causal_lm import MoEForCausalLM
from moe.model.router_precision import decide
from moe.routing.decision import Context, Knobs
from moe.specialization.information import expert_shares
from moe.specialization.observation import BLOCKS_PER_PASS, Observation
from moe.training.probe import assignment_mask


def next_layer(
    model: MoEForCausalLM, observed: Observation, knobs: Knobs, *, document: Int[np.ndarray, " B"]
) -> list[dict[str, Any]]:
    """Return for each MoE layer but the last what it tells about the next one.

    transitions: see `transitions`.
    by_choice: how well the experts of a token predict its next ones, see `predicted_by_choice`. None for one document.
    by_state: how well the next router predicts them from the hidden states that this router gets, one layer too early
        (Eliseev and Mazur 2312.17238). None for a chain of routers, and for a router that cannot be asked again.
    A prediction has the `overlap` of predicted and true experts (the hit rate, if both are equally many), and `kappa`,
    the overlap beyond that of shuffled tokens with the same loads: 0 is chance, 1 is always right.
    """
    early = _decisions_one_layer_early(model, observed, knobs)
    half = np.unique(document, return_inverse=True)[1] % 2 == 0
    half = np.repeat(half, observed.ids.shape[1])
    found = []
    for layer in range(len(observed.chosen) - 1):
        before, after = observed.chosen[layer], observed.chosen[layer + 1]
        by_choice = None if half.all() else _agreement(predicted_by_choice(before, after, half), after)
        by_state = None if early is None else _agreement(early[layer], after)
        found.append({"transitions": transitions(before, after), "by_choice": by_choice, "by_state": by_state})
    return found


def transitions(before: Bool[np.ndarray, "N E"], after: Bool[np.ndarray, "N F"]) -> Float[np.ndarray, "E F"]:
    """Return how often tokens of the row expert take the column expert in the next layer, as a multiple of chance.

    Each of a token's k experts counts 1/k. Chance is independence of the two layers: the product of the two loads. So
    1 is chance, whatever the loads are. NaN for experts without tokens.
    """
    a, b = expert_shares(before), expert_shares(after)
    joint, expected = a.T @ b / len(a), np.outer(a.mean(0), b.mean(0))
    return np.divide(joint, expected, out=np.full(joint.shape, np.nan), where=expected > 0)


def predicted_by_choice(
    before: Bool[np.ndarray, "N E"], after: Bool[np.ndarray, "N F"], half: Bool[np.ndarray, " N"]
) -> Bool[np.ndarray, "N F"]:
    """Predict the next experts of each token from its experts here: those that tokens with these experts took most.

    The frequencies P(next expert | expert) are those of the other half of the tokens, so that no token predicts itself.
    They are averaged over the token's experts, and as many experts are predicted as the token takes. half: which tokens
    are in the first half.
    """
    predicted = np.zeros_like(after)
    for known in (half, ~half):
        joint = before[known].T.astype(float) @ expert_shares(after[known])
        tokens = before[known].sum(0)[:, None]
        given = np.divide(joint, tokens, out=np.zeros_like(joint), where=tokens > 0)
        scores = expert_shares(before[~known]) @ given
        rank = np.argsort(np.argsort(-scores, -1, kind="stable"), -1, kind="stable")
        predicted[~known] = rank < after[~known].sum(-1, keepdims=True)
    return predicted


def _agreement(predicted: Bool[np.ndarray, "N E"], after: Bool[np.ndarray, "N E"]) -> dict[str, float]:
    found = overlap(predicted[None], after[None])
    return {"overlap": found["overlap"][0], "kappa": found["kappa_shuffled"][0]}


@torch.no_grad()
def _decisions_one_layer_early(
    model: MoEForCausalLM, observed: Observation, knobs: Knobs
) -> list[Bool[np.ndarray, "N _"]] | None:
    """Return what the router of each layer but the first chooses for the hidden states of the layer before."""
    layers = [*model.moe_layers]
    routers = [layer.router for layer in layers]
    if any(len(router.chain) > 1 or router.weights_elsewhere for router in routers) or len(routers) < 2:
        return None
    parts = []
    for part in observed.blocks.to(model.device).split(BLOCKS_PER_PASS):
        calls: list[tuple[Tensor, Context]] = []
        with ExitStack() as stack:
            for router in routers:
                hook = router.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs))
                stack.callback(hook.remove)
            model(**part.inputs, knobs=knobs)
        masks = []
        for layer, (x, _), (_, context) in zip(layers[1:], calls, calls[1:], strict=False):
            decision = decide(layer.router, x, context, layer.router_precision)
            masks.append(assignment_mask((decision,), tokens=part.ids.numel(), experts=layer.router.num_experts))
        parts.append(masks)
    return [torch.cat(of_layer).cpu().numpy() for of_layer in zip(*parts, strict=True)]
