"""Whether a difference would also be seen on other text: intervals over documents beside those over seeds."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe.analysis.bootstrap import bootstrap
from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, TableBlock, csv_file, literal, long_list
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.sentences import decimals, levels_compared
from moe.analysis.statistics import NAMES, comparisons, contrasts, table_of_comparisons
from moe.checks import plain
from moe.results.comparable import NOT_COMPARABLE
from moe.results.conditions import narrowed
from moe.runs.documents import FILE, DocumentLosses, read_documents

LOSS = "val/loss"
EXPLAINED = """\
The difference of the validation loss, in nats per token, between runs of the same seed. The interval over seeds says
which difference other seeds would show on this text (t interval). The interval over documents says which difference
these runs would show on other text of the same kind (bootstrap-t over documents, paired by document, averaged over the
seeds). It is missing below four documents, and where a run has other documents or no losses by document. This table
describes; it tests nothing."""


def other_seeds_and_other_text(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the contrasts of the validation loss, each with its interval over seeds and its interval over documents."""
    runs = inputs.runs  # those that did not finish have no loss, but their level may be a reference
    recorded = any((Path(folder) / FILE).exists() for folder in runs.loc[runs["status"] == "finished", "folder"])
    if inputs.contrasts.empty or LOSS not in runs or not recorded:
        return
    references = dict(inputs.contrasts[["factor", "reference"]].drop_duplicates("factor").itertuples(index=False))
    table = contrasts(runs, LOSS, inputs.factors, references=references)
    table = table[table["factor"].isin(references)]
    on_other_text = table["note"].str.startswith(NOT_COMPARABLE)
    problems = [f"{levels_compared(row)}: {row.note}" for row in table[on_other_text].itertuples()]
    table = table[(table["n"] > 0) & ~on_other_text]
    read = cache(partial(_read, problems=problems))
    few = narrowed(runs, (LOSS, "seed", "folder", "causal", "place", *inputs.factors))
    sides = {tuple(names.values()): pair for names, *pair in comparisons(few, inputs.factors, references)}
    rows = []
    for _, row in table.iterrows():
        folders = [
            side[side[LOSS].notna()].set_index("seed")["folder"] for side in sides[tuple(row[names] for names in NAMES)]
        ]
        pairs = pd.concat(folders, axis=1).dropna().to_numpy()
        losses = {folder: read(folder) for folder in pairs.ravel()}
        problems += _differing_documents(losses)
        documents = _over_documents([[losses[folder] for folder in pair] for pair in pairs])
        rows.append(row[[*NAMES, "n", "difference", "ci_low", "ci_high"]].to_dict() | documents)
    found = table_of_comparisons(rows)
    compared = len(found) > 0 and found["documents"].any()
    if not compared and not problems:
        return
    yield Heading("Other seeds and other text")
    if problems:
        yield from long_list([literal(problem) for problem in dict.fromkeys(problems)])
    if not compared:
        return
    ends = ["ci_low", "ci_high"], ["documents_low", "documents_high"]
    digits = [
        max(decimals(row["difference"], *row[columns], least=4) for columns in ends) for _, row in found.iterrows()
    ]
    over_seeds, over_documents = (
        [_interval(low, high, number) for (low, high), number in zip(found[columns].to_numpy(), digits, strict=True)]
        for columns in ends
    )
    shown = found[[*NAMES, "n"]].assign(
        **{
            "difference": [plain(f"{d:+.{number}f}") for d, number in zip(found["difference"], digits, strict=True)],
            "over seeds": over_seeds,
            "documents": found["documents"],
            "over documents": over_documents,
        }
    )
    yield Paragraph(EXPLAINED)
    yield TableBlock(shown)
    yield csv_file("documents", found, "this table.")


def _read(folder: str, *, problems: list[str]) -> DocumentLosses | None:
    try:
        return read_documents(Path(folder))
    except ValueError as error:
        problems.append(str(error))
        return None


def _differing_documents(losses: dict[str, DocumentLosses | None]) -> list[str]:
    """Return a sentence for each run whose validation documents are not those of the first run."""
    known = [(folder, each.tokens) for folder, each in losses.items() if each is not None]
    first, documents = known[0] if known else ("", np.empty(0))
    return [
        f"{folder}: no interval over documents, because its {len(tokens)} validation documents with {tokens.sum():.0f} "
        f"tokens are not the {len(documents)} with {documents.sum():.0f} tokens of {first}"
        for folder, tokens in known
        if not np.array_equal(tokens, documents)
    ]


def _over_documents(pairs: list[list[DocumentLosses | None]]) -> dict[str, Any]:
    """Return the number of documents, and the interval over them of the difference, averaged over pairs of runs.

    There are none if a run has no losses by document, or not the same documents as the others.
    """
    known = [losses for pair in pairs for losses in pair if losses is not None]
    same = bool(known) and all(np.array_equal(losses.tokens, known[0].tokens) for losses in known)
    if not same or len(known) < 2 * len(pairs):
        return {"documents": 0, "documents_low": float("nan"), "documents_high": float("nan")}
    used = known[0].tokens > 0
    tokens = known[0].tokens[used]
    differences = np.mean([a.nats - b.nats for a, b in zip(known[::2], known[1::2], strict=True)], axis=0)[used]
    found = bootstrap(differences / tokens, np.arange(len(tokens)), weight=tokens)
    return {"documents": len(tokens), "documents_low": found["low"], "documents_high": found["high"]}


def _interval(low: float, high: float, digits: int) -> str:
    return "–" if np.isnan(low) else plain(f"[{low:+.{digits}f}, {high:+.{digits}f}]")
