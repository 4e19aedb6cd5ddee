"""What a metric is: the fields of an entry of the catalog, and the words that these fields may have."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe.metrics.formulas import Sums

LETTERS = """\
T tokens, L layers with experts, E experts. K_t: number of experts that token t asks for; K: its mean over tokens.
c_e: load of expert e, which is the number of tokens that ask for it, before drops; f_e = c_e / Σ c.
p_t: the router's probabilities for token t, at the router's temperature; P_e: mean of p_te over tokens.
z_t: the clean logits of token t, without noise and temperature. H(p) = -Σ p ln p, in nats.
kept: number of assignments carried out, after drops. W: the router's matrix, one row for each expert.
mean_t, std_t, var_t: over tokens; CV: std / mean; [A] is 1 where A is true and 0 elsewhere.
"""

GROUPS = {
    "quality": "Quality on the validation set",
    "test": "Quality on the test text, after the last step",
    "capacity limit": "Quality under the capacity limit of training",
    "balance": "Balance of the load",
    "capacity": "Capacity and the number of experts",
    "sharpness": "Sharpness of the router",
    "specialization": "Specialization of the experts",
    "agreement": "Agreement between tokens, and over training",
    "drift": "Drift from the checkpoint with which a run began",
    "loss": "Losses in training",
    "router loss": "Losses of single routers",
    "gradients": "Gradients and updates",
    "settings": "Settings that a schedule changes",
    "speed": "Time and FLOPs",
    "distribution": "Distributions, as lists",
}

NULL_POOLED = "null if layers differ in their number of experts"
VARIANTS = {
    "pooled": f"the loads of all layers are added first, so that opposite imbalances cancel; {NULL_POOLED}",
    "worst": "value of the worst layer",
    "layerNN": "value of one layer with experts, from `/layer00`",
    "<domain>": "value of one domain of the data",
    "decileN": "value of one decile of the position, `/decile0` to `/decile9`",
}
LAYER = ("layerNN",)
POOLED = ("pooled", "worst", *LAYER)

SHOWN = {
    "headline": "tables of the console and of the report",
    "tested": "compared and tested in every report",
    "conditions": "the report's table of routing by condition, with the variant that headlines have",
    "layer figures": "figures by layer",
    "gradient figure": "the figure of gradients and updates",
    "dashboard layers": "the dashboard's panels for each layer; six, because W&B shows six panels on a page",
}

WRITTEN = {
    "evaluation": "at every evaluation; metrics.json has the last value, except for settings and times",
    "step": "at every optimizer step",
    "end": "once, after the last step; metrics.json has it",
}


class Metric(NamedTuple):
    """A metric: what it means and where it is shown.

    A metric with a `function` is computed from routing sums alone and is the mean over layers. Such a metric is also
    written at every optimizer step, as `train/<name>` and without variants.
    """

    name: str
    formula: str
    meaning: str
    label: str  # `axis` adds the unit
    group: str  # key of GROUPS
    unit: str = ""
    better: str | None = None  # "lower" | "higher"
    directions: tuple[str, str] | None = None  # words for a rise and for a fall; by default `better` gives them
    variants: tuple[str, ...] = ()  # keys of VARIANTS
    written: tuple[str, ...] = ("evaluation",)  # keys of WRITTEN
    function: Callable[[Sums], np.ndarray] | None = None
    shown: tuple[str, ...] = ()  # keys of SHOWN
    headline_variant: str = ""  # the variant that is tested and shown in headlines
    noun: str = ""  # short name for verdicts, as in "+14 perplexity"; by default `label`
    nonnegative: bool = False  # never below 0, so that an axis does not begin below 0, even if an interval does
    per_token: bool = False  # a mean over tokens of text, which cannot be compared between tokenizers

    @property
    def axis(self) -> str:
        """Label with the unit, for the axis of a figure."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def final(self) -> bool:
        """Whether metrics.json has the metric as one number."""
        named = "/" in self.name and self.group != "distribution"
        return named and ("end" in self.written or ("evaluation" in self.written and self.group != "speed"))

    @property
    def headline(self) -> str:
        """Full name of the variant that is tested and shown in headlines."""
        return f"{self.name}/{self.headline_variant}" if self.headline_variant else self.name

    @property
    def when_null(self) -> str:
        """When it has no value, such as "null if no token asks for two experts"; empty if it always has one."""
        sentences = re.split(r"(?<=\.) ", self.meaning)
        return "; ".join(f"n{each[1:].removesuffix('.')}" for each in sentences if each.startswith("Null "))

    @property
    def rise(self) -> str:
        """Word for a rise of this metric, such as "worse"."""
        return self.directions[0] if self.directions else self._direction("higher")

    @property
    def fall(self) -> str:
        """Word for a fall of this metric, such as "better"."""
        return self.directions[1] if self.directions else self._direction("lower")

    def _direction(self, direction: str) -> str:
        if self.better is None:
            return direction
        improves = direction == self.better
        if self.group == "balance":
            return "more balanced" if improves else "less balanced"
        return "better" if improves else "worse"

    def variant(self, suffix: str) -> "Metric | None":
        """Return this metric under the name, label and noun of a variant; None if it has no such variant.

        The meaning of `/pooled` also says when it is null.
        """
        meaning = self.meaning
        if "pooled" in self.variants and suffix == "pooled":
            text = "layers pooled"
            meaning += f" {NULL_POOLED.capitalize()}."
        elif "worst" in self.variants and suffix == "worst":
            text = "worst layer"
        elif "layerNN" in self.variants and (match := re.fullmatch(r"layer([0-9]{2,})", suffix)):
            text = f"layer {int(match[1])}"
        elif "decileN" in self.variants and (match := re.fullmatch(r"decile([0-9])", suffix)):
            text = f"decile {match[1]} of the position"
        elif "<domain>" in self.variants and suffix:
            text = suffix
        else:
            return None
        return self.narrowed(f"{self.name}/{suffix}", text)._replace(meaning=meaning)

    def narrowed(self, name: str, text: str) -> "Metric":
        """Return this metric under another name, with what `text` says about it in its label and its noun."""
        noun = self.noun and (f"{self.noun[:-1]}, {text})" if self.noun.endswith(")") else f"{self.noun} ({text})")
        return self._replace(name=name, label=f"{self.label}, {text}", noun=noun)
