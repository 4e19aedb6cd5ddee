"""The origin of the numbers: routers, configurations, data, code, machine and versions."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from moe.analysis.report.blocks import Details, Heading, Paragraph, ReportBlock, TableBlock
from moe.analysis.report.inputs import ReportInputs
from moe.config.keys import flatten, is_free
from moe.results.table import FACTS, level
from moe.runs.planned import short
from moe.runs.record import RunRecord

MAX_LEVELS = 12  # of one key that are listed
CHECKSUM = re.compile(r"\b(?=[0-9]*[a-f])[0-9a-f]{12,}\b")  # of files, and the commit
COUNTS_EXPLAINED = """\
`val.blocks` and `val.predicted_bytes` count the validation blocks that are evaluated, at most `data.max_val_blocks` of
them. The other columns count the whole text, before this limit."""


def causality(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield every router, and whether a token's routing depends on later tokens."""
    runs = inputs.runs.drop_duplicates("folder")  # a run has a row for each grid to which it belongs
    if "router" not in runs:
        return
    yield Heading("Routers")
    yield Paragraph(
        "A router that is not causal sees later tokens, so its loss cannot be compared with that of a causal router."
    )
    counts = runs["router"].value_counts(sort=False)
    finished = runs.loc[runs["status"] == "finished", "router"].value_counts()
    rows = [{"router": name, "runs": n, "finished": finished.get(name, 0)} for name, n in counts.items()]
    yield TableBlock(pd.DataFrame(rows, columns=["router", "runs", "finished"]))


def configuration(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the keys in which the runs differ, each with its role, and the keys in which all runs agree."""
    runs = inputs.runs.drop_duplicates("folder")
    keys = [key for key in runs if "/" not in key and key not in FACTS]
    settings = [flatten(record.config) | record.choices for record in _records(inputs)]
    unset = {key for each in settings for key, value in each.items() if value is None}
    shown = {key: {level(None): "null"} for key in unset & set(keys)}  # as in YAML and on the command line
    differing, common = differences(runs[keys].replace(shown))
    role = dict.fromkeys(inputs.factors, "varied") | {"seed": "unit of replication"}
    role |= {follower: f"follows {leader}" for follower, leader in inputs.tied.items()}
    role |= {key: "free: does not change what is computed" for key in differing["key"] if is_free(key)}
    roles = [role.get(key) or _leaders(runs, key, inputs.factors) for key in differing["key"]]
    yield Heading("Configuration")
    yield Paragraph("Keys in which the runs differ." if len(differing) else "No key differs between the runs.")
    if len(differing):
        yield TableBlock(differing.assign(role=roles))
    yield Details(f"{len(common)} keys in which all runs agree", [TableBlock(common)])


def _leaders(runs: pd.DataFrame, key: str, factors: list[str]) -> str:
    """Return which factors, as few as possible, determine the level of a key, or whether it applies to a run."""
    causes = [*factors, "seed"]
    for leaders in [*((cause,) for cause in causes), *itertools.combinations(causes, 2), tuple(causes)]:
        if set(leaders) <= set(runs) and (runs.groupby(list(leaders))[key].nunique() < 2).all():
            return f"follows {', '.join(leaders)}"
    return "differs between runs of one condition"


def data(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield every data manifest of the runs: which text they read, from which packages, and its checksums."""
    manifests: dict[str, list[Any]] = {}
    for record in _records(inputs):
        if record.facts is not None:
            manifests.setdefault(json.dumps(record.facts.data, sort_keys=True), []).append(record)
    yield Heading("Data")
    if not manifests:
        yield Paragraph("No run has a data manifest.")
    if len(manifests) > 1:
        yield Paragraph(f"**{len(manifests)} different manifests**: compare only runs that share a manifest.")
    for text, records in manifests.items():
        manifest = json.loads(text)
        domains = manifest.pop("domains", {})
        yield Paragraph(f"{len(records)} runs read corpus `{_value_text(manifest.get('corpus_sha256', 'unknown'))}`.")
        if isinstance(domains, dict) and all(isinstance(domain, dict) for domain in domains.values()):
            yield Paragraph(COUNTS_EXPLAINED)
            rows = [{"domain": name} | _shortened(flatten(domain)) for name, domain in domains.items()]
            yield TableBlock(pd.DataFrame(rows))
        others = [{"key": key, "value": _value_text(value)} for key, value in flatten(manifest).items()]
        yield Details("Other entries of the manifest", [TableBlock(pd.DataFrame(others, columns=["key", "value"]))])


def software(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield commit, machine and library versions: first those that differ between the runs, then the common ones."""
    rows = [flatten(_software(record)) for record in _records(inputs)]
    differing, common = differences(pd.DataFrame(rows, dtype=object))
    yield Heading("Code, machine and versions")
    if len(differing):
        yield Paragraph("**The runs differ here**, so the last digits of their results may not be comparable.")
        yield TableBlock(differing)
    yield TableBlock(common)


def differences(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the keys with several values, each value with its number of runs, and the keys with one value.

    `table` has a row for each run and a column for each key.
    """
    differing, common = [], []
    for key in table:
        counts = table[key].dropna().map(_value_text).value_counts()
        values = [f"{value} (×{counts[value]})" for value in sorted(counts.index, key=_sort_key)]
        if len(values) > 1:
            more = [f"and {len(values) - MAX_LEVELS} more"] if len(values) > MAX_LEVELS else []
            differing.append({"key": key, "values": ", ".join(values[:MAX_LEVELS] + more)})
        elif values:
            common.append({"key": key, "value": counts.index[0]})
    return pd.DataFrame(differing, columns=["key", "values"]), pd.DataFrame(common, columns=["key", "value"])


def _sort_key(value: str) -> tuple[bool, float, str]:
    """Sort numbers by size, then texts."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _value_text(value: Any) -> str:
    """Return a value as text, with checksums shortened; the records of the runs have all of them."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return CHECKSUM.sub(lambda found: short(found[0]), text)


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with their texts as `_value_text` shows them."""
    return {key: _value_text(value) if isinstance(value, str) else value for key, value in values.items()}


def _software(record: RunRecord) -> dict[str, Any]:
    """Return everything, apart from the configuration, that may influence the last digits of a run."""
    plugins = {name: plugin._asdict() for name, plugin in record.plugins.items()}
    always = {"commit": record.commit, "versions": record.versions, "machine": record.machine._asdict()}
    always |= {"plugins": plugins} if plugins else {}
    facts = record.facts
    if facts is None:
        return always
    return always | {"device": facts.device, "ranks": facts.ranks._asdict(), "process": facts.process}


def _records(inputs: ReportInputs) -> Iterable[RunRecord]:
    """Return the record of every run of these inputs that has a readable one."""
    return [inputs.records[folder] for folder in inputs.runs["folder"].unique() if folder in inputs.records]
