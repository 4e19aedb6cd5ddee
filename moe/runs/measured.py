"""The types of what `python -m moe.specialization` measures on a run, as they are in its specialization.json.

There are L layers. Each has E experts, and E can differ from layer to layer. A number that could not be computed is
null in the file and None here.
"""

import itertools
from collections.abc import Sequence
from typing import Any, TypedDict

Number = float | None
Row = list[Number]
Grid = list[Row]  # usually by layer and expert (L, E)


class Interval(TypedDict):
    """A mean, and its 95 % bootstrap interval over documents."""

    mean: Number
    low: Number
    high: Number
    documents: int


class ValidationLoss(Interval):
    """The loss of all validation blocks in nats per token."""

    blocks: int
    tokens: int


class GridInterval(TypedDict):
    """As `Interval`, for each expert of each layer (L, E)."""

    mean: Grid
    low: Grid
    high: Grid
    documents: int


class Comparison(TypedDict):
    """A statistic, compared with its values for shuffled routing. See `moe.specialization.information`."""

    observed: Number
    normalized: Number
    null: Number
    null_high: Number
    adjusted: Number
    z: Number
    p: Number


class DomainDependence(Comparison):
    smallest_p: Number
    documents: int
    bias: Number
    ami: Number


class VocabularyDependence(TypedDict):
    ids: int
    tokens: int
    id: Comparison
    specialization: Comparison


class Vocabulary(TypedDict):
    """How the experts depend on the token itself, on the next one, and on the predicted one, for each layer."""

    input: list[VocabularyDependence | None]
    next: list[VocabularyDependence | None]
    predicted: list[VocabularyDependence | None]


class Keyword(TypedDict):
    token: str
    tfidf: Number
    count: int
    share: Number


class ExpertWords(TypedDict):
    """The keywords of an expert, and for some of them the text before, at and after the token."""

    keywords: list[Keyword]
    contexts: list[list[str]]


class Knockout(TypedDict):
    delta: GridInterval
    null: GridInterval
    excess: GridInterval
    domains: list[int]
    by_domain: list[Grid]
    rho: Row
    rho_excess: Row


class Knockouts(TypedDict):
    rerouted: Knockout
    zeroed: Knockout


class Regret(TypedDict):
    regret: Interval
    advantage: Interval
    better: Interval
    tokens: int
    routes: int
    values: Row


class Curve(TypedDict):
    loss: Row
    flipped: Row


class Landscape(TypedDict):
    distances: list[float]
    blocks: int
    tokens: int
    curves: dict[str, Curve]


class Embedding(TypedDict):
    pca: list[Grid]
    explained: Row
    tsne: list[Grid]
    perplexity: float


class Agreement(TypedDict):
    """Agreement of choices at `step` with others, for each layer (L)."""

    step: int
    overlap: Row
    kappa: Row
    kappa_shuffled: Row


class Change(Agreement):
    since: int


class LayerAgreement(TypedDict):
    matched: Number
    chance: Number
    kappa: Number
    rand: Number


class SeedAgreement(TypedDict):
    """Agreement with the run in `folder`, which differs in its seed alone, for each layer (L)."""

    seed: int
    folder: str
    layers: list[LayerAgreement]


class LossAtK(TypedDict):
    """The loss with k experts per token, and its difference from the loss with the model's own k."""

    k: int
    loss: Interval
    difference: Interval


class Correlation(TypedDict):
    """Spearman's rho of two values of the experts, and its 95 % interval over experts."""

    rho: Number
    low: Number
    high: Number


class Correlations(TypedDict):
    """By layer (L), and joined over layers."""

    layers: list[Correlation]
    all: Correlation


class Saliency(TypedDict):
    """The saliency of each expert, and how it agrees with the knock-out of each kind; none if there were no knock-outs.

    See `moe.specialization.saliency`.
    """

    values: Grid
    rho: dict[str, Correlations]


class Prediction(TypedDict):
    overlap: Number
    kappa: Number


class NextLayer(TypedDict):
    """What a layer tells about the next one, see `moe.specialization.next_layer`. transitions: (E here, E there)."""

    transitions: Grid
    by_choice: Prediction | None
    by_state: Prediction | None


class Similarity(TypedDict):
    """Cosines of the experts of each layer (L, E, E), see `moe.specialization.geometry.similarities`."""

    outputs: list[Grid]
    weights: list[Grid] | None


class Measured(TypedDict):
    """Everything that is measured on the experts of a run.

    knockout, regret: None and empty if no other experts were tried (`--samples 0`).
    """

    tokens: int
    blocks: int
    documents: int
    domains: list[str]
    experts_per_token: Row
    load: Grid
    given_domain: list[Grid]
    domain: list[DomainDependence | None]
    vocabulary: Vocabulary
    given_position: list[Grid]
    coactivation: list[Grid]
    coactivation_chance: Row
    keywords: list[list[ExpertWords]]
    knockout: Knockouts | None
    regret: list[Regret]
    loss_by_k: list[LossAtK]
    landscape: Landscape | None
    embedding: Embedding | None
    similarity: Similarity
    saliency: Saliency
    next_layer: list[NextLayer]
    saturation: list[Agreement]
    churn: list[Change]
    seed_agreement: list[SeedAgreement]


# Of nested lists of equal length; or of the entry of each layer.
Shape = tuple[int, ...] | Sequence[tuple[int, ...]]


def check_shapes(measured: Measured) -> None:
    """Raise ValueError, naming the key, unless all lists have the lengths that follow from `load` and `domains`."""
    numbers = [len(load) for load in measured["load"]]
    if not numbers or 0 in numbers:
        raise ValueError("measured.load: must have at least one layer, and one expert in each")
    layers = len(numbers)
    deciles = len(measured["given_position"][0]) if measured["given_position"] else 0
    by_layer: Shape = (layers,)
    grid: Shape = [(experts,) for experts in numbers]
    pairs: Shape = [(experts, experts) for experts in numbers]
    shapes: list[tuple[str, Any, Shape]] = [
        ("experts_per_token", measured["experts_per_token"], by_layer),
        ("given_domain", measured["given_domain"], [(len(measured["domains"]), experts) for experts in numbers]),
        ("domain", measured["domain"], by_layer),
        *((f"vocabulary.{name}", entries, by_layer) for name, entries in measured["vocabulary"].items()),
        ("given_position", measured["given_position"], [(deciles, experts) for experts in numbers]),
        ("coactivation", measured["coactivation"], pairs),
        ("coactivation_chance", measured["coactivation_chance"], by_layer),
        ("keywords", measured["keywords"], grid),
        *([("regret", measured["regret"], by_layer)] if measured["regret"] or measured["knockout"] else []),
        *(("seed_agreement", entry["layers"], by_layer) for entry in measured["seed_agreement"]),
    ]
    shapes += [("similarity", table, pairs) for table in measured["similarity"].values() if table is not None]
    shapes += [("saliency.values", measured["saliency"]["values"], grid)]
    shapes += [("saliency.rho", entry["layers"], by_layer) for entry in measured["saliency"]["rho"].values()]
    shapes += [("next_layer", measured["next_layer"], (layers - 1,))]
    tables = [entry["transitions"] for entry in measured["next_layer"]]
    shapes += [("next_layer.transitions", tables, [*itertools.pairwise(numbers)])]
    found = measured["knockout"]
    for knockout in (found["rerouted"], found["zeroed"]) if found is not None else ():
        for part in (knockout["delta"], knockout["null"], knockout["excess"]):
            shapes += [("knockout", values, grid) for values in (part["mean"], part["low"], part["high"])]
    for key, agreements in (("saturation", measured["saturation"]), ("churn", measured["churn"])):
        for entry in agreements:
            shapes += [(key, row, by_layer) for row in (entry["overlap"], entry["kappa"], entry["kappa_shuffled"])]
    if (embedding := measured["embedding"]) is not None:
        points_of_layers = [(experts, 2) for experts in numbers]
        shapes += [("embedding", points, points_of_layers) for points in (embedding["pca"], embedding["tsne"])]
        shapes += [("embedding.explained", embedding["explained"], (2,))]
    if (landscape := measured["landscape"]) is not None:
        if 0 not in landscape["distances"]:
            raise ValueError("measured.landscape.distances: must have a 0")
        number = (len(landscape["distances"]),)
        for name, curve in landscape["curves"].items():
            shapes += [(f"landscape.{name}", values, number) for values in (curve["loss"], curve["flipped"])]
    for key, values, shape in shapes:
        if not _has_shape(values, shape):
            raise ValueError(f"measured.{key}: must have the shape {_in_words(shape)}")


def _has_shape(values: Any, shape: Shape) -> bool:
    if isinstance(shape, list):
        return len(values) == len(shape) and all(map(_has_shape, values, shape))
    return not shape or (len(values) == shape[0] and all(_has_shape(item, shape[1:]) for item in values))


def _in_words(shape: Shape) -> str:
    """Return a shape such as 2 x 8; for layers of different shapes, the shape of each."""
    if isinstance(shape, list):
        if len({*shape}) > 1:
            return ", ".join(map(_in_words, shape)) + " by layer"
        shape = (len(shape), *shape[0]) if shape else (0,)
    return " x ".join(map(str, shape))
