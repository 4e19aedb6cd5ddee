"""Experts as points: what they do to the same tokens, projected to two dimensions."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from moe.data.blocks import Batch
from moe.model.decoder import MoEForCausalLM
from moe.routing.decision import Knobs, Routing
from moe.specialization.interventions import altered
from moe.specialization.observation import BATCH

PROBES = 64  # tokens that every expert works on


@torch.no_grad()
def expert_outputs(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> Float[Tensor, "L E ND"]:
    """What every expert of a layer makes of the same N tokens as its layer sees them, one vector an expert, norm 1.

    Outputs, not weights: hidden units can be permuted without changing what an expert does. The tokens are evenly
    spaced over the first blocks.
    """
    first = blocks.to(model.device).take(slice(BATCH))
    stride = max(1, first.ids.numel() // PROBES)
    vectors = []
    for layer in model.moe_layers:
        inputs: list[Tensor] = []

        def listen(routing: Routing, x: Tensor, inputs: list[Tensor] = inputs) -> Routing:
            inputs.append(x)
            return routing

        with altered(layer, listen):
            model(first.ids, position_ids=first.position_ids, knobs=knobs)
        x, experts = inputs[0][::stride].to(layer.experts.up.dtype), layer.router.num_experts
        outputs = layer.experts(x.repeat(experts, 1), torch.full((experts,), len(x)))
        vectors.append(torch.nn.functional.normalize(outputs.view(experts, -1).float(), dim=-1))
    return torch.stack(vectors).cpu()


def projections(vectors: Float[np.ndarray, "L E F"]) -> dict[str, Any] | None:
    """pca, tsne: (L, E, 2) of all experts of all layers together; explained: the two components' shares of variance.

    t-SNE keeps neighbors, not distances. None with fewer than four experts in all.
    """
    rows = vectors.reshape(-1, vectors.shape[-1]).astype(float)
    if len(rows) < 4:
        return None
    pca = PCA(n_components=2, svd_solver="full").fit(rows)
    perplexity = min(10.0, (len(rows) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)
    shape = (*vectors.shape[:2], 2)
    return {
        "pca": pca.transform(rows).reshape(shape),
        "explained": pca.explained_variance_ratio_,
        "tsne": tsne.reshape(shape),
        "perplexity": perplexity,
    }
