"""Tests of the agreement of two routings beyond chance."""

import math

import numpy as np
import pytest

from moe.metrics.agreement import divergence, drift, overlap


@pytest.mark.parametrize("numbers", [[2], [1, 4], [0, 1, 8]])
def test_the_overlap_by_chance_is_that_of_shuffled_tokens_also_if_k_varies(numbers: list[int]) -> None:
    """The chance level behind `kappa_shuffled` is the mean overlap over many shuffles of the tokens of one side.

    Both sides give a token equally many experts. After a shuffle they do not, and the larger number counts as k.
    """
    rng = np.random.default_rng(0)
    active = np.resize(numbers, 400)
    skew = np.linspace(0, 1, 8)  # loads are uneven
    a, b = (((rng.random((400, 8)) + skew).argsort(1).argsort(1) >= 8 - active[:, None])[None] for _ in range(2))
    found = overlap(a, b)
    kappa, observed = found["kappa_shuffled"][0], found["overlap"][0]
    chance = (observed - kappa) / (1 - kappa)
    shuffles = [overlap(a, b[:, rng.permutation(400)])["overlap"][0] for _ in range(300)]
    assert chance == pytest.approx(np.mean(shuffles), rel=0.01)


def made_up(rng: np.random.Generator, *, skew: float, k: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return choices (2, 2000, 8) and probabilities (2, 1, 2000, 8) of a random router whose loads are uneven."""
    logits = rng.normal(size=(2, 2000, 8)) + skew * np.linspace(0, 1, 8)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return probs.argsort(-1).argsort(-1) >= 8 - k, probs[:, None].astype(np.float32)


def test_the_drift_is_what_loops_over_tokens_compute() -> None:
    rng = np.random.default_rng(0)
    (base, p), (now, q) = (made_up(rng, skew=1.0) for _ in range(2))
    found = drift(base, now, (p, q))
    for layer in range(2):
        divergences, changed = [], []
        for token in range(2000):
            pairs = zip(p[layer, 0, token].tolist(), q[layer, 0, token].tolist(), strict=True)
            divergences.append(sum(a * math.log(a / b) for a, b in pairs))
            before, after = ({*np.flatnonzero(chosen[layer, token])} for chosen in (base, now))
            changed.append(len(after - before) / 2)
        assert found[f"routing/drift_kl/layer{layer:02d}"] == pytest.approx(np.mean(divergences), rel=1e-5)
        assert found[f"routing/drift_churn/layer{layer:02d}"] == pytest.approx(np.mean(changed), rel=1e-12)
    for name in ("kl", "churn", "kappa"):
        layers = [found[f"routing/drift_{name}/layer{layer:02d}"] for layer in range(2)]
        assert found[f"routing/drift_{name}"] == pytest.approx(np.mean(layers))  # type: ignore[arg-type]


@pytest.mark.parametrize("skew", [0.0, 2.0, 5.0])
def test_two_random_routers_agree_no_more_than_by_chance_however_uneven_their_loads(skew: float) -> None:
    """Churn falls as loads become uneven, although the routers know nothing of each other. Kappa stays at 0."""
    rng = np.random.default_rng(1)
    found = [drift(made_up(rng, skew=skew)[0], made_up(rng, skew=skew)[0], None) for _ in range(20)]
    kappa, churn = (np.array([each[f"routing/drift_{name}"] for each in found]) for name in ("kappa", "churn"))
    assert abs(kappa.mean()) < 3 * kappa.std(ddof=1) / math.sqrt(20) + 1e-3
    assert churn.mean() < {0.0: 0.76, 2.0: 0.7, 5.0: 0.55}[skew]
    assert found[0]["routing/drift_kl"] is None


def test_an_unchanged_router_has_no_drift_and_a_probability_of_zero_keeps_it_finite() -> None:
    chosen, probs = made_up(np.random.default_rng(2), skew=1.0)
    same = drift(chosen, chosen, (probs, probs))
    assert (same["routing/drift_kl"], same["routing/drift_churn"], same["routing/drift_kappa"]) == (0, 0, 1)
    moved = probs[:, 0].astype(np.float32)
    assert (divergence(moved, moved * np.float32(1 + 2e-7)) >= 0).all()
    [far] = divergence(np.array([[[0.5, 0.5, 0.0]]]), np.array([[[1.0, 0.0, 0.0]]]))
    assert far == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / np.finfo(np.float32).tiny))
