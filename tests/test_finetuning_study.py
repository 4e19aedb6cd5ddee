"""Tests that docs/finetuning.md says what the shipped runs of `experiment=finetuning` say.

`python tests/test_finetuning_study.py` prints the tables of that page.
"""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from moe.analysis.claims import judge
from moe.analysis.statistics import contrasts
from moe.config.claim import ClaimConfig

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "docs" / "studies" / "finetuning"
PAGE = ROOT / "docs" / "finetuning.md"
EXPERIMENT = yaml.safe_load((ROOT / "conf" / "experiment" / "finetuning.yaml").read_text())
ARMS = EXPERIMENT["hydra"]["sweeper"]["params"]["variant"].split(",")
NEW, OLD = "val/loss_in_domain", "val/loss_out_of_domain"
RATE = "optimizer.adamw_lr"


def shipped(name: str, experiment: str = "finetuning") -> pd.DataFrame:
    runs = pd.read_csv(SHIPPED / name)
    return runs[runs["experiment"] == experiment].reset_index(drop=True)


def name_of(arm: str) -> str:
    return f"`{arm.removeprefix('finetune_')}`"


def pilot_table() -> list[str]:
    """Return the lines of the table of the pilot: the loss in the new domain by arm and learning rate."""
    loss = shipped("pilot.csv.gz").pivot(index="variant", columns=RATE, values=NEW)
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in loss) + " |", "|---|" + "--:|" * len(loss.columns)]
    for arm in ARMS:
        best = loss.loc[arm].min()
        cells = ["" if pd.isna(v) else f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in loss.loc[arm]]
        lines.append(f"| {name_of(arm)} | " + " | ".join(cells) + " |")
    return lines


def study_table() -> list[str]:
    """Return the lines of the table of the study: a row for each arm, and one for the base."""
    runs, base = shipped("runs.csv.gz"), shipped("runs.csv.gz", "finetuning_base").iloc[0]
    speed = shipped("first_pilot.csv.gz").groupby("variant")["time/tokens_per_s"].median()
    against = contrasts(runs, NEW, ["variant"], references={"variant": ARMS[0]}).set_index("level")
    lines = [
        "| arm | trained parameters | loss, new domain | difference from `all`, 95 % interval | loss, old domains |"
        " peak memory, GB | speed |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| the base | | {base[OLD]:.2f} | | {base[NEW]:.2f} | | |",
    ]
    for arm in ARMS:
        of_arm = runs[runs["variant"] == arm]
        difference = ""
        if arm in against.index:
            row = against.loc[arm]
            difference = f"{row['difference']:+.2f} ({row['ci_low']:+.2f} to {row['ci_high']:+.2f})"
        cells = [
            f"{int(of_arm['parameters.trainable'].iloc[0]):,}",
            f"{of_arm[NEW].mean():.2f}",
            difference,
            f"{of_arm[OLD].mean():.2f}",
            f"{of_arm['peak_memory_gb'].median():.2f}",
            f"{speed[arm] / speed[ARMS[0]]:.2f}",
        ]
        lines.append(f"| {name_of(arm)} | " + " | ".join(cells) + " |")
    return lines


def claims_table() -> list[str]:
    """Return the lines of the table of the planned claims."""
    of_validation = [claim | {"metric": claim["metric"].replace("test/", "val/")} for claim in EXPERIMENT["claims"]]
    claims = [ClaimConfig(**claim) for claim in of_validation]  # the runs are older than the test text
    judged = judge(shipped("runs.csv.gz").assign(status="finished"), claims)
    lines = ["| claim | verdict | difference, 95 % interval |", "|---|---|--:|"]
    for claim, row in zip(claims, judged.to_dict("records"), strict=True):
        interval = f"{row['difference']:+.2f} ({row['ci_low']:+.2f} to {row['ci_high']:+.2f})"
        lines.append(f"| {claim.text} | {row['verdict']} | {interval} |")
    return lines


TABLES = (pilot_table, study_table, claims_table)


@pytest.mark.parametrize("table", TABLES)
def test_the_page_has_the_table_that_the_shipped_runs_give(table) -> None:
    assert "\n".join(table()) in PAGE.read_text()


def test_each_arm_of_the_study_has_the_best_rate_of_the_pilot() -> None:
    pilot, runs = shipped("pilot.csv.gz"), shipped("runs.csv.gz")
    best = pilot.loc[pilot.groupby("variant")[NEW].idxmin()].set_index("variant")[RATE]
    for arm in ARMS:
        preset = yaml.safe_load((ROOT / "conf" / "variant" / f"{arm}.yaml").read_text())
        used = runs.loc[runs["variant"] == arm, RATE].unique()
        assert used.tolist() == [best[arm]] == [preset["optimizer"]["adamw_lr"]], arm


def test_perft_d_and_perft_s_end_at_the_same_losses() -> None:
    pilot = shipped("first_pilot.csv.gz").set_index(["variant", RATE])[[NEW, OLD]]
    assert pilot.loc["finetune_perft_d"].equals(pilot.loc["finetune_perft_s"])


def test_no_seed_of_the_pilot_is_in_the_study_and_every_arm_has_the_same_seeds() -> None:
    pilot, runs = shipped("pilot.csv.gz"), shipped("runs.csv.gz")
    seeds = [set(runs.loc[runs["variant"] == arm, "seed"]) for arm in ARMS]
    assert all(each == seeds[0] for each in seeds)
    assert len(seeds[0]) == 4
    assert not seeds[0] & set(pilot["seed"])


if __name__ == "__main__":
    print("\n\n".join("\n".join(table()) for table in TABLES))
