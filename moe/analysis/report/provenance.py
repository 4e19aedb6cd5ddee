"""Where the numbers come from: causal labels, what the configurations share, data, code, machine and versions."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from moe.analysis.report.blocks import Block, Details, Heading, Table, Text
from moe.analysis.report.inputs import ReportInputs
from moe.config.schema import flatten, is_free
from moe.results.table import FACTS

MOST_LEVELS = 12  # of one key that are written out
SOFTWARE = ("commit", "versions", "machine", "device", "ranks", "process")  # of a run's record


def causality(inputs: ReportInputs) -> Iterator[Block]:
    """Every router with whether a token's routing depends on later tokens."""
    runs = inputs.runs
    if "router" not in runs:
        return
    yield Heading("Routers")
    yield Text("A router that is not causal sees later tokens: its loss compares with no causal router's.")
    counts = runs["router"].value_counts(sort=False)
    finished = runs.loc[runs["status"] == "finished", "router"].value_counts()
    rows = [{"router": name, "runs": n, "finished": finished.get(name, 0)} for name, n in counts.items()]
    yield Table(pd.DataFrame(rows, columns=["router", "runs", "finished"]))


def configuration(inputs: ReportInputs) -> Iterator[Block]:
    """The keys in which the runs differ, each with its role, and those in which all agree."""
    runs = inputs.runs
    keys = [key for key in runs if "/" not in key and key not in FACTS]
    differing, common = differences(runs[keys])
    role = dict.fromkeys(inputs.factors, "varied") | {"seed": "unit of replication"}
    role |= {follower: f"follows {leader}" for follower, leader in inputs.tied.items()}
    roles = [
        role.get(key, "free: no part of what is computed" if is_free(key) else "follows seed")
        for key in differing["key"]
    ]
    yield Heading("Configuration")
    yield Text("Keys in which the runs differ." if len(differing) else "No key differs between the runs.")
    if len(differing):
        yield Table(differing.assign(role=roles))
    yield Details(f"{len(common)} keys in which all runs agree", [Table(common)])


def data(inputs: ReportInputs) -> Iterator[Block]:
    """Every data manifest that occurs: which text, from which packages, with which checksums."""
    manifests: dict[str, list[Any]] = {}
    for record in _records(inputs.runs):
        if isinstance(record.get("data"), dict):
            manifests.setdefault(json.dumps(record["data"], sort_keys=True), []).append(record)
    yield Heading("Data")
    if not manifests:
        yield Text("No run has a data manifest.")
    if len(manifests) > 1:
        yield Text(f"**{len(manifests)} different manifests**: compare numbers only between runs that share one.")
    for text, records in manifests.items():
        manifest = json.loads(text)
        domains = manifest.pop("domains", {})
        yield Text(f"{len(records)} runs read corpus `{manifest.get('corpus_sha256', 'without a checksum')}`.")
        if isinstance(domains, dict) and all(isinstance(domain, dict) for domain in domains.values()):
            yield Table(pd.DataFrame([{"domain": name} | flatten(domain) for name, domain in domains.items()]))
        yield Details("The rest of the manifest", [Table(_values(flatten(manifest)))])


def software(inputs: ReportInputs) -> Iterator[Block]:
    """Commit, machine and library versions: where the runs differ, and what they share."""
    rows = [flatten({key: record.get(key) for key in SOFTWARE}) for record in _records(inputs.runs)]
    differing, common = differences(pd.DataFrame(rows, dtype=object))
    yield Heading("Code, machine and versions")
    if len(differing):
        yield Text("**Runs differ here**, so the last digits of their numbers need not be comparable.")
        yield Table(differing)
    yield Table(common)


def differences(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """From a row a run and a column a key: the keys with several values (and how often each), and those with one."""
    differing, common = [], []
    for key in table:
        counts = table[key].dropna().map(_shown).value_counts()
        values = [f"{value} (×{counts[value]})" for value in sorted(counts.index, key=_order)]
        if len(values) > 1:
            more = [f"and {len(values) - MOST_LEVELS} more"] if len(values) > MOST_LEVELS else []
            differing.append({"key": key, "values": ", ".join(values[:MOST_LEVELS] + more)})
        elif values:
            common.append({"key": key, "value": counts.index[0]})
    return pd.DataFrame(differing, columns=["key", "values"]), pd.DataFrame(common, columns=["key", "value"])


def _values(flat: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([{"key": key, "value": _shown(value)} for key, value in flat.items()], columns=["key", "value"])


def _order(value: str) -> tuple[bool, float, str]:
    """Numbers by size, then texts."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _records(runs: pd.DataFrame) -> Iterable[dict[str, Any]]:
    """The run.json of every run that has a readable one."""
    for folder in runs.loc[~runs["status"].isin(["missing", "unreadable"]), "folder"]:
        yield json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
