"""Represent each expert by its outputs for the same tokens, and project the experts to two dimensions."""

from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn

from moe.data.blocks import Batch
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Context, Knobs
from moe.specialization.observation import BLOCKS_PER_PASS

PROBE_TOKENS = 64  # Tokens that every expert works on.


@torch.no_grad()
def expert_outputs(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> list[Float[Tensor, "_ ND"]]:
    """Return, for each layer, the outputs of every expert for the same N tokens, as one vector of norm 1 per expert.

    The tokens are evenly spaced over the first blocks; an expert gets the hidden states that reach its layer. Outputs
    are used rather than weights, because hidden units can be permuted without changing what an expert does.
    """
    first = blocks.to(model.device).take(slice(BLOCKS_PER_PASS))
    stride = max(1, first.ids.numel() // PROBE_TOKENS)
    inputs: list[Tensor] = []  # of each layer

    def record(_: nn.Module, arguments: Any) -> None:
        x, context = arguments[0], cast(Context, arguments[1])
        inputs.append(context.routed(x.reshape(-1, x.shape[-1]))[::stride])

    hooks = [layer.register_forward_pre_hook(record) for layer in model.moe_layers]
    model(**first.inputs, knobs=knobs)
    for hook in hooks:
        hook.remove()
    vectors = []
    for layer, x in zip(model.moe_layers, inputs, strict=True):
        outputs = layer.outputs_of_all(x.to(next(layer.experts.parameters()).dtype))
        vectors.append(torch.nn.functional.normalize(outputs.flatten(1).float(), dim=-1))
    return [of_layer.cpu() for of_layer in vectors]


def similarities(model: MoEForCausalLM, vectors: list[Float[Tensor, "_ ND"]]) -> dict[str, Any]:
    """Return how similar the experts of each layer are to each other, by cosine: 1 is equal, 0 is unrelated.

    outputs: of `vectors`, from `expert_outputs`: their outputs on the same tokens. This compares what experts do.
    weights: of the first matrix of each expert, as it is stored. Two experts can do the same with their hidden units in
        another order, and then look unrelated here. So this tells how far copies of one network have moved apart, as
        after upcycling, and it can miss the similarity of experts that were drawn at random. None if the matrices are
        not known, as in imported models.
    """
    first = [layer.experts.first for layer in model.moe_layers]
    known = [
        torch.nn.functional.normalize(each.detach().flatten(1).float(), dim=-1) for each in first if each is not None
    ]
    weights = [(unit @ unit.T).cpu().numpy() for unit in known] if len(known) == len(first) else None
    return {"outputs": [(of_layer @ of_layer.T).numpy() for of_layer in vectors], "weights": weights}


def projections(vectors: list[Float[np.ndarray, "_ F"]]) -> dict[str, Any] | None:
    """Return two-dimensional projections of all experts of all layers together.

    vectors: of the experts of each layer.
    pca, tsne: coordinates (E, 2) for each layer. t-SNE keeps neighbors, not distances.
    explained: the shares of the variance that the two components of the PCA explain.
    perplexity: about how many neighbors t-SNE considers.

    Returns None with fewer than four experts in all.
    """
    rows = np.concatenate(vectors).astype(float)
    if len(rows) < 4:
        return None
    pca = PCA(n_components=2, svd_solver="full").fit(rows)
    perplexity = min(10.0, (len(rows) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)
    ends = np.cumsum([len(of_layer) for of_layer in vectors])[:-1]
    return {
        "pca": np.split(pca.transform(rows), ends),
        "explained": pca.explained_variance_ratio_,
        "tsne": np.split(tsne, ends),
        "perplexity": perplexity,
    }
