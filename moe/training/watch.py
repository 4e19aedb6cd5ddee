"""Notice when the routing of a layer collapses: few experts take almost everything, or experts get no token at all.

`formulas.collapsed` defines what few experts are. A single step proves nothing, so something is told once it has held
for `HOLD` steps in a row, and it is over once it has not held for as many. What chance does in a step of few tokens is
allowed for: see `LoadWatch.see`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from moe.metrics import formulas
from moe.metrics.formulas import Sums
from moe.routers.base import Router
from moe.runs.collapse import HOLD, KINDS, Collapse

EXPECTED = 20  # tokens that an even load would have given an expert while it got none; the chance of that is e^-20
COLUMNS = 2  # of the arrays of `LoadWatch`: "same", "few", and then one for each expert


def can_collapse(router: Router) -> bool:
    """Return whether an uneven load tells something about a router: not if labels or token ids choose the experts."""
    return not (router.told or router.uses_ids)


class LoadWatch:
    """Watches the loads of all layers, from step to step. Its state goes into checkpoints.

    experts: the number of experts of each layer. watched: whether each is watched. quiet: the steps at the beginning in
    which nothing is told. What has begun in them and still holds is told after them.
    """

    def __init__(self, experts: list[int], *, watched: list[bool], quiet: int) -> None:
        self._experts = np.array(experts, dtype=np.int64)
        self._watched = np.array(watched, dtype=bool)
        self._quiet = quiet
        most = max(experts, default=0)
        shape = (len(watched), COLUMNS + most)
        self._since, self._last = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._told = np.zeros(shape, dtype=bool)
        self._unused_told = np.full(len(watched), -HOLD)  # the last step in which each layer told unused experts
        self._busy = np.zeros((len(watched), COLUMNS, most), dtype=bool)  # when "same" and "few" were told
        self._ended: list[Collapse] = []

    def see(self, step: int, s: Sums) -> list[Collapse]:
        """Take in the sums of all layers over the tokens of a step. Return what is told for the first time, or is over.

        An expert without a token is told after so many steps that an even load would have given it `EXPECTED` tokens.
        A layer tells such experts at most once in `HOLD` steps, and not while few experts take almost everything.
        """
        busy, groups = formulas.busy(s), s.groups()
        whole = [formulas.of_groups(each, groups) == 1 for each in (formulas.constant, formulas.collapsed)]
        now = np.column_stack([*whole, s.offered == 0])  # NaN, of an expert that a layer lacks, is not 0
        now &= self._watched[:, None]
        needed = np.full(now.shape, float(HOLD))
        expected = s.assignments / self._experts
        unlikely = np.divide(EXPECTED, expected, out=np.full(expected.shape, np.inf), where=expected > 0)
        needed[:, COLUMNS:] = np.maximum(HOLD, unlikely)[:, None]
        self._since = np.where(now & (self._since == 0), step, self._since)
        self._last = np.where(now, step, self._last)
        begins = now & ~self._told & (step - self._since + 1 >= needed) & (step > self._quiet)
        begins[:, COLUMNS:] &= (step - self._unused_told >= HOLD)[:, None]
        self._unused_told = np.where(begins[:, COLUMNS:].any(1), step, self._unused_told)
        ends = self._told & ~now & (step - self._last >= HOLD)
        self._busy = np.where(begins[:, :COLUMNS, None], busy[:, None], self._busy)
        begun, ended = self._findings(begins, over=False), self._findings(ends, over=True)
        self._ended += ended
        told = self._told | begins
        crowded = set(np.flatnonzero(told[:, :COLUMNS].any(1)).tolist())
        self._told = told & ~ends
        self._since = np.where(now | self._told, self._since, 0)
        return [each for each in begun + ended if each.kind != "unused" or each.layer not in crowded]

    def findings(self) -> list[Collapse]:
        """Return all that was told so far. What still holds has no `until`."""
        return sorted([*self._ended, *self._findings(self._told, over=False)], key=lambda each: each[:2])

    def _findings(self, selected: Bool[np.ndarray, "L N"], *, over: bool) -> list[Collapse]:
        """Return what is selected. A layer's experts without tokens are one finding, of the steps that they share."""
        found, experts = [], self._experts.tolist()
        for layer, column in np.argwhere(selected[:, :COLUMNS]).tolist():
            members = np.flatnonzero(self._busy[layer, column]).tolist()
            span = int(self._since[layer, column]), int(self._last[layer, column]) if over else None
            found.append(Collapse(layer, KINDS[column], members, experts[layer], *span))
        for layer in np.flatnonzero(selected[:, COLUMNS:].any(1)).tolist():
            columns = COLUMNS + np.flatnonzero(selected[layer, COLUMNS:])
            span = int(self._since[layer, columns].max()), int(self._last[layer, columns].min()) if over else None
            found.append(Collapse(layer, "unused", (columns - COLUMNS).tolist(), experts[layer], *span))
        return found

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as numbers and lists."""
        arrays = {"since": self._since, "last": self._last, "told": self._told, "busy": self._busy}
        arrays |= {"unused_told": self._unused_told}
        return {name: array.tolist() for name, array in arrays.items()} | {"ended": [tuple(e) for e in self._ended]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self._since, self._last, self._unused_told = (
            np.array(state[name], dtype=np.int64) for name in ("since", "last", "unused_told")
        )
        self._told, self._busy = (np.array(state[name], dtype=bool) for name in ("told", "busy"))
        self._ended = [Collapse(*each) for each in state["ended"]]
