"""What one model's routing and experts do, in words: from its metrics, and from its specialization.json if it has one.

`findings` makes the answer about one model that was evaluated and not trained. `experts_by_layer` is a table about any
runs.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from moe.analysis.figures.expert_grids import MeasuredRun, to_array
from moe.analysis.figures.specialization import measured_runs, why_one_number
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.sentences import p_equals
from moe.analysis.statistics import corrected
from moe.checks import plain

SHUFFLED = 0.975  # share of shuffles below `null_high` (`moe.runs.measured.Comparison`)
NO_INTERVAL = "Fewer than four documents give no interval"
_ENDS = ("mean", "low", "high")


class Finding(NamedTuple):
    """What is known about one question: its name, a clause for the answer ("" for none), and the numbers behind it."""

    name: str
    clause: str
    fact: str


def findings(inputs: ReportInputs) -> list[Finding]:
    """Return what is known about the routing and the experts of the only model of a report."""
    measured, reasons = measured_runs(inputs.runs)
    found = list(_load(inputs.runs.iloc[0]))
    if not measured:
        why = reasons or "it has no specialization.json; python -m moe.specialization FOLDER writes it"
        return [*found, Finding("Experts", "what its experts do was not measured", f"Not measured: {why}.")]
    parts = (_domains, _tokens, _removals, _other_routes, _numbers_of_experts)
    return [*found, *(finding for part in parts for finding in part(measured[0].found))]


def experts_by_layer(runs: list[MeasuredRun]) -> pd.DataFrame:
    """Return a row for each layer of each run: what its choices depend on, and what the removal of experts costs.

    `EXPERTS_BY_LAYER` in `moe.analysis.report.sections.routing` explains the columns.
    """
    rows = []
    for run in runs:
        p_domain = _holm(run.found["domain"])
        for layer, domain in enumerate(run.found["domain"]):
            token = run.found["vocabulary"]["input"][layer]
            row: dict[str, Any] = {"condition": run.condition, "seed": run.seed} if runs[1:] else {}
            row |= {"layer": layer}
            row |= {"domain": _number(domain, "adjusted"), "p domain": p_domain[layer]}
            row |= {"token": _number(token and token["id"], "adjusted")}
            if run.found["knockout"]:
                parts = run.found["knockout"]["rerouted"]
                top = int(np.argmax(np.nan_to_num(to_array(parts["excess"]["mean"][layer]), nan=-np.inf)))
                row |= {"missed most": top, "rise": parts["delta"]["mean"][layer][top]}
                row |= {f"rise beyond random{_end(end)}": parts["excess"][end][layer][top] for end in _ENDS}
                rho = run.found["saliency"]["rho"]["rerouted"]["layers"][layer]
                row |= {"saliency": rho["rho"], "saliency low": rho["low"], "saliency high": rho["high"]}
            if run.found["regret"]:
                advantage = run.found["regret"][layer]["advantage"]
                row |= {f"other routes{_end(end)}": advantage[end] for end in _ENDS}
            if following := run.found["next_layer"]:
                after = following[layer] if layer < len(following) else {"by_choice": None, "by_state": None}
                row |= {"next by experts": _number(after["by_choice"], "kappa")}
                row |= {"next by state": _number(after["by_state"], "kappa")}
            rows.append(row)
    return pd.DataFrame(rows)


def pairs_of_experts(runs: list[MeasuredRun]) -> pd.DataFrame:
    """Return a row for each two experts of each layer of each run: the cosines of their outputs and weights."""
    rows = []
    for run in runs:
        outputs, weights = (run.found["similarity"][name] for name in ("outputs", "weights"))
        for layer, table in enumerate(outputs):
            for expert, other in itertools.combinations(range(len(table)), 2):
                row: dict[str, Any] = {"condition": run.condition, "seed": run.seed, "layer": layer}
                row |= {"expert": expert, "other expert": other, "cosine of outputs": table[expert][other]}
                row |= {"cosine of weights": weights and weights[layer][expert][other]}
                rows.append(row)
    return pd.DataFrame(rows)


def _end(end: str) -> str:
    return "" if end == "mean" else f" {end}"


def _load(metrics: pd.Series) -> Iterator[Finding]:
    """Yield how evenly the experts are used, by layer and over all layers together, and what chance alone would give.

    The terminal prints the mean over layers, and the tables of a report have the pooled value.
    """
    cv, pooled, share, floor, unused = (
        float(metrics.get(f"routing/{name}", math.nan))
        for name in ("load_cv", "load_cv/pooled", "load_cv_normalized", "load_cv_floor", "unused_experts")
    )
    if math.isnan(cv):
        return
    fact = f"The load CV is {cv:.3g} as the mean over layers, where 0 is even"
    fact += f" and {cv / share:.3g} the most that is possible" if share > 0 else ""
    fact += f". Tokens routed at random would give about {floor:.2g}" if math.isfinite(floor) else ""
    fact += f". With the loads of all layers added first (pooled), it is {pooled:.3g}" if math.isfinite(pooled) else ""
    fact += f". Share of experts without a token: {unused:.1%}" if math.isfinite(unused) else ""
    yield Finding("Load of the experts", f"the load CV is {cv:.3g} as the mean over layers", f"{fact}.")


def _domains(found: dict[str, Any]) -> Iterator[Finding]:
    """Yield whether the choices depend on the domain of a text more than if domains are shuffled over documents."""
    name, entries = "Domains", found["domain"]
    tested = [entry for entry in entries if entry is not None]
    if not tested:
        yield Finding(name, "", "All text is of one domain, so a preference for domains cannot be seen.")
        return
    p, adjusted = _holm(entries), to_array([_number(entry, "adjusted") for entry in entries])
    count = int((p <= SIGNIFICANCE).sum())
    fact = f"The choices depend on the domain in {count} of {len(tested)} layers, compared with domains that are "
    fact += f"shuffled over the {found['documents']} documents (p at most 5 % after Holm's correction for the layers"
    fact += f"; the smallest: {p_equals(float(np.nanmin(p)))})" if np.isfinite(p).any() else ")"
    if (adjusted > 0).any():
        most = int(np.nanargmax(adjusted))
        fact += f". Most in layer {most}: beyond chance, the domain tells {adjusted[most]:.1%} of what it could tell "
        fact += "about the experts of a token"
    if count:
        clause = f"experts prefer domains in {count} of {len(tested)} layers"
    elif min(entry["smallest_p"] or 0 for entry in tested) * len(tested) > SIGNIFICANCE:
        clause = "the documents are too few to show whether experts prefer domains"
        fact += ". With so few documents, no result could have shown it"
    else:
        clause = "no preference for domains is shown"
        fact += ". A preference that is too weak for this text to show is possible"
    yield Finding(name, clause, f"{fact}.")


def _tokens(found: dict[str, Any]) -> Iterator[Finding]:
    """Yield how much the token itself tells about its experts, if enough tokens occur often enough."""
    entries = {i: each["id"] for i, each in enumerate(found["vocabulary"]["input"]) if each is not None}
    tells = {layer: entry["adjusted"] for layer, entry in entries.items() if entry["adjusted"] is not None}
    if not tells:
        return
    above = sum(_number(entry, "normalized") > _number(entry, "null_high") for entry in entries.values())
    least, most = min(tells, key=lambda layer: tells[layer]), max(tells, key=lambda layer: tells[layer])
    tokens = f"{tells[least]:.1%} (layer {least}) to {tells[most]:.1%} (layer {most})"
    fact = f"The choices depend on the token in {above} of {len(entries)} layers, more than in 97.5 % of shuffles; by "
    fact += f"chance alone, {(1 - SHUFFLED) * len(entries):.2g} layers would. Beyond chance, the token tells {tokens} "
    fact += "of what it could tell about its experts."
    clause = f"experts depend on the token itself in {above} of {len(entries)} layers"
    yield Finding("Tokens", clause, fact)


def _removals(found: dict[str, Any]) -> Iterator[Finding]:
    """Yield how many experts are missed more than equally many random assignments, and which one is missed most."""
    name = "Removed experts"
    if not found["knockout"]:
        yield Finding(name, "", "No expert was removed (--samples 0).")
        return
    parts = found["knockout"]["rerouted"]
    experts = [(layer, expert) for layer, of_layer in enumerate(found["load"]) for expert in range(len(of_layer))]
    ends = {end: to_array([*itertools.chain(*parts["excess"][end])]) for end in _ENDS}
    excess = ends["mean"]
    signs = _signs(ends | {"documents": parts["excess"]["documents"]})
    among = excess if signs is None or not (signs > 0).any() else np.where(signs > 0, excess, -np.inf)
    place = int(np.argmax(np.nan_to_num(among, nan=-np.inf)))
    layer, expert = experts[place]
    rise, null = (to_array(parts[part]["mean"][layer])[expert] for part in ("delta", "null"))
    top = f"expert {expert} of layer {layer}"
    fact = f"Without {top}, whose tokens then go to their next-best experts, the loss changes by {rise:+.2g} nats per "
    fact += f"token, and by {null:+.2g} if as many random choices are changed. The difference of the two is "
    fact += f"{excess[place]:+.2g}{_interval(ends['low'][place], ends['high'][place])}, the largest of "
    fact += f"{excess.size} experts; the largest looks larger than it is."
    if signs is None:
        yield Finding(name, "", f"{fact} {NO_INTERVAL}.")
        return
    missed = int((signs > 0).sum())
    counted = (
        f"{missed} of {excess.size} experts {'is' if missed == 1 else 'are'} missed more than as many random choices"
    )
    none = "no expert is shown to be missed more than as many random choices"
    yield Finding(name, f"{counted}, most {top}" if missed else none, f"{counted}. {fact}")


def _other_routes(found: dict[str, Any]) -> Iterator[Finding]:
    """Yield in how many layers the chosen experts are better, or worse, than other experts of the same token."""
    if not found["regret"]:
        return
    advantage = {end: [each["advantage"][end] for each in found["regret"]] for end in _ENDS}
    signs = _signs(advantage | {"documents": found["documents"]})
    regret = np.mean(to_array([each["regret"]["mean"] for each in found["regret"]]))
    routes = " or ".join(map(str, sorted({each["routes"] for each in found["regret"]})))
    fact = f"{NO_INTERVAL}."
    if signs is not None:
        fact = f"The chosen experts give a lower mean loss than other ones in {(signs > 0).sum()} of {len(signs)} "
        fact += f"layers, and a higher one in {(signs < 0).sum()}."
    fact += (
        f" The best of {routes} routes, which nobody knows before the next token, would lower the loss of a token by "
    )
    fact += f"{regret:.2g} nats (mean over layers)."
    yield Finding("Other experts", "", fact)


def _numbers_of_experts(found: dict[str, Any]) -> Iterator[Finding]:
    """Yield how the loss changes with fewer and with more experts for each token."""
    used = np.nanmean(to_array(found["experts_per_token"]))
    rows = found["loss_by_k"]
    own = min((row["k"] for row in rows), key=lambda k: abs(k - used), default=0)
    others = {row["k"]: row["difference"] for row in rows if row["k"] != own}
    if not others:
        yield Finding("Number of experts", "", f"Not tried: {why_one_number(rows)}.")
        return
    parts = [f"{_signed(each['mean'])}{_interval(each['low'], each['high'])} with {k}" for k, each in others.items()]
    fact = f"Difference from the loss with {own} for each token, in nats per token: {'; '.join(parts)}."
    table = {end: [each[end] for each in others.values()] for end in _ENDS}
    signs = _signs(table | {"documents": found["documents"]})
    if signs is None:
        yield Finding("Number of experts", "", f"{fact} {NO_INTERVAL}.")
        return
    sides: dict[str, set[int]] = {}
    for k, sign in zip(others, signs, strict=True):
        sides.setdefault("fewer" if k < own else "more", set()).add(int(sign))
    effects = {side: _effect(of_side) for side, of_side in sides.items()}
    if len(set(effects.values())) == 1:
        effects = {" or ".join(effects): next(iter(effects.values()))}
    clause = " and ".join(f"{side} experts for each token {effect}" for side, effect in effects.items())
    yield Finding("Number of experts", clause, fact)


def _effect(signs: set[int]) -> str:
    """Return what some numbers of experts do to the loss, given the signs of the differences that are sure."""
    if signs == {0}:
        return "are not shown to change the loss"
    if {1, -1} <= signs:
        return "raise or lower the loss, depending on their number"
    return f"{'raise' if 1 in signs else 'lower'} the loss" + (", if not for every number" if 0 in signs else "")


def _signs(interval: dict[str, Any]) -> np.ndarray | None:
    """Return 1 or -1 where a mean is above or below 0 by more than chance explains, and else 0; None without intervals.

    interval: as `moe.runs.measured.Interval`, for one or many means. For m means each end of a 95 % interval is moved
    out by the ratio of the quantiles of Student's t at 5 % / m and at 5 %, with documents - 1 degrees of freedom. So
    chance makes any of the m signs in about 5 % of cases (Bonferroni).
    """
    mean, low, high = (to_array(interval[end]) for end in _ENDS)
    if not (np.isfinite(low) & np.isfinite(high)).any():
        return None
    tail, freedom = SIGNIFICANCE / 2, interval["documents"] - 1
    wider = student.isf(tail / mean.size, freedom) / student.isf(tail, freedom)
    above, below = mean - wider * (mean - low) > 0, mean + wider * (high - mean) < 0
    return above.astype(int) - below.astype(int)


def _holm(entries: list[dict[str, Any] | None]) -> np.ndarray:
    """Return the p of each layer after Holm's correction for the layers; NaN where there was no test."""
    return corrected(pd.Series([_number(entry, "p") for entry in entries], dtype=float))


def _signed(number: float | None) -> str:
    return "–" if number is None else plain(f"{number:+.2g}")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None or math.isnan(low) else plain(f" [{low:.2g}, {high:.2g}]")


def _number(entry: dict[str, Any] | None, key: str) -> float:
    """Return a number of an entry; NaN if the number or the whole entry is null."""
    return math.nan if entry is None or entry[key] is None else float(entry[key])
