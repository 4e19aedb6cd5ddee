"""What is told about a layer whose routing has collapsed: in the terminal, in events, in run.json and in the report.

`moe.training.watch` notices it.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

HOLD = 20  # steps for which something must hold before it is told
NAMED = 4  # experts that a sentence names, if there are no more

Kind = Literal["same", "few", "unused"]
KINDS: tuple[Kind, ...] = ("same", "few", "unused")


class Collapse(NamedTuple):
    """What the loads of a layer showed from step `since` to step `until`.

    kind: "same": all tokens asked for the same experts. "few": few experts took 90 % of the assignments. "unused": no
        token asked for any of these experts.
    experts: the experts that took the assignments, or for "unused" those that got none. of: number of all experts.
    until: null if it still held after the last step.
    """

    layer: int
    kind: Kind
    experts: list[int]
    of: int
    since: int
    until: int | None

    def sentence(self) -> str:
        """Return it in words, such as "layer 3: 2 of 8 experts (1, 5) take 90 % of the assignments since step 40"."""
        numbers = f" ({', '.join(map(str, self.experts))})" if len(self.experts) <= NAMED else ""
        counted = f"{len(self.experts)} of {self.of} experts{numbers}"
        take = "takes" if len(self.experts) == 1 else "take"
        now, then = {
            "same": (f"all tokens take {counted} and no others", f"all tokens took {counted} and no others"),
            "few": (f"{counted} {take} 90 % of the assignments", f"{counted} took 90 % of the assignments"),
            "unused": (f"no token takes {counted}", f"no token took {counted}"),
        }[self.kind]
        if self.until is not None:
            return f"layer {self.layer}: {then} from step {self.since} to step {self.until}, and no longer"
        return f"layer {self.layer}: {now}" + (f" since step {self.since}" if self.since else "")


def quiet_steps(steps: int, warmup: float) -> int:
    """Return the number of steps of the warm-up of the learning rate, in which nothing is told."""
    return math.ceil(warmup * steps)


def is_too_short(steps: int, warmup: float) -> bool:
    """Return whether a run ends before a collapse could be told: it has too few steps, or ends within the warm-up.

    A run without training steps shows the model as it is, so it is not too short.
    """
    return steps > 0 and (steps < HOLD or steps <= quiet_steps(steps, warmup))


def sentences(found: Iterable[Collapse]) -> list[str]:
    """Return findings in words, by layer. Where all tokens take the same experts, what follows from it is left out."""
    found = sorted(found, key=lambda each: (each.layer, KINDS.index(each.kind), each.since))
    whole = {(each.layer, each.since, each.until) for each in found if each.kind == "same"}
    return [e.sentence() for e in found if e.kind == "same" or (e.layer, e.since, e.until) not in whole]
