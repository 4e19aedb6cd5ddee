"""Tests of planned claims: runs that recorded a claim judge it, the data decide, and chance does not."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from run_folders import change_record, write_metrics

from moe.analysis.claims import contrasts_without_claim, evidence_sentence, judge, judge_planned, planned_claims
from moe.analysis.statistics import contrasts
from moe.analysis.studies.published import as_runs, experiment_claims, read_published
from moe.checks import ConfigError
from moe.config.claim import ClaimConfig
from moe.config.options import CONF, options
from moe.launch.command_line import read_cells
from moe.launch.run import write_run_record
from moe.metrics.catalog import lookup
from moe.results.table import load_runs

PPL = "val/perplexity"
WITH_CLAIMS = [
    *("experiment_a", "experiment_c", "noise_lb_seed", "spectra_ablation", "spectra_scaling"),
    *(f"spectra_sweep_{letter}" for letter in "abcde"),
    *("temperature_ablation", "temperature_schedules"),
]
# Of a large grid a part that every claim can be judged by: composing a cell takes a while.
NARROWED = {
    "spectra_ablation": [
        "variant=spectra_full,spectra_no_expression,spectra_no_gru,spectra_no_repulsion,spectra_no_ortho,spectra_no_all,top1,top2"
    ],
    "spectra_sweep_a": ["router.expert_choice_capacity_factor=1.0,1.25"],
    "spectra_sweep_b": [
        *("router.sinkhorn_epsilon=0.03,0.2", "router.sinkhorn_iterations=2,8", "router.log_sinkhorn_enabled=true")
    ],
    "spectra_sweep_c": ["router.osr_repulsion_weight=0.0,1.0"],
    "spectra_sweep_d": ["router.router_entropy_coef=0.0,0.1"],
    "spectra_sweep_e": ["data.seq_len=128,256"],
}


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels' multipletests collects garbage at every call, which takes half a second beside torch."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def claim(kind: str, levels: list[Any], than: list[Any] | None = None, **extra: Any) -> ClaimConfig:
    return ClaimConfig(text=kind, metric=PPL, factor="noise", levels=levels, than=than or [], kind=kind, **extra)


def runs_of(
    means: dict[Any, float], *, seeds: int = 5, spread: float = 0.1, draw: int = 0, factor: str = "noise"
) -> pd.DataFrame:
    """Return runs with these true means by level; seeds differ by much, and runs of a seed by a little more."""
    rng = np.random.default_rng(draw)
    luck = rng.normal(0, 5, seeds)
    rows = [
        {factor: level, "seed": seed, PPL: mean + luck[seed] + rng.normal(0, spread)}
        for level, mean in means.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows).assign(status="finished", folder="made up", experiment="made up")


def read_experiment(name: str) -> str:
    return (CONF / "experiment" / f"{name}.yaml").read_text()


def only(runs: pd.DataFrame, *claims: ClaimConfig) -> pd.Series:
    """Return the judgment of the first claim."""
    return judge(runs, list(claims)).iloc[0]


def test_a_pair_is_the_paired_t_test_of_the_seeds_means_over_the_other_factor() -> None:
    runs = as_runs(read_published("noise_runs"))
    row = only(runs, claim("higher", [0.1], [0.0]))
    by_seed = runs.groupby(["noise", "seed"])[PPL].mean()
    expected = stats.ttest_rel(by_seed[0.1], by_seed[0.0])
    assert row["n"] == 3
    assert row["difference"] == pytest.approx(by_seed[0.1].mean() - by_seed[0.0].mean())
    assert row["p"] == pytest.approx(expected.pvalue)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected.confidence_interval()))
    shifted = runs.assign(**{PPL: runs[PPL] + runs["seed"].map({42: 0.0, 43: 7.0, 44: -3.0})})
    assert only(shifted, claim("higher", [0.1], [0.0]))["p"] == pytest.approx(row["p"]), "seeds are blocks"


@pytest.mark.parametrize("lb", [0.0, 0.01])
def test_one_cell_gives_the_golden_contrast(lb: float) -> None:
    runs = as_runs(read_published("noise_runs"))
    row = only(runs[runs["lb"] == lb], claim("higher", [0.1], [0.0]))
    assert row["p"] == pytest.approx({0.0: 0.0166, 0.01: 0.0014}[lb], abs=5e-5)
    assert row["verdict"] == "supported"


@pytest.mark.parametrize(
    ("kind", "levels", "than", "means"),
    [
        ("higher", [0.5], [0.0], {0.0: 100, 0.5: 103}),
        ("lower", [0.5], [0.0], {0.0: 103, 0.5: 100}),
        ("higher", [0.5, 1.0], [0.0, 0.1], {0.0: 100, 0.1: 100, 0.5: 103, 1.0: 103}),
        ("lowest", [0.5], [], {0.0: 103, 0.1: 103, 0.5: 100}),
        ("highest", [0.5, 0.1], [], {0.0: 100, 0.1: 103, 0.5: 103}),
    ],
)
def test_flipped_data_flip_the_verdict(kind: str, levels: list[float], than: list[float], means: dict) -> None:
    flipped = {level: 203 - mean for level, mean in means.items()}
    assert only(runs_of(means), claim(kind, levels, than))[["verdict", "estimates"]].tolist() == [
        *("supported", "as claimed")
    ]
    assert only(runs_of(flipped), claim(kind, levels, than))[["verdict", "estimates"]].tolist() == [
        *("contradicted", "against")
    ]


@pytest.mark.parametrize(
    "of_noise",
    [
        claim("higher", [0.5], [0.0]),
        claim("lower", [0.1, 0.5], [0.0]),
        claim("lowest", [0.1, 0.5]),
        claim("highest", [0.0]),
    ],
    ids=lambda each: f"{each.kind} {each.levels}",
)
def test_luck_alone_decides_one_time_in_twenty_at_most(of_noise: ClaimConfig) -> None:
    draws = 60
    verdicts = [only(runs_of({0.0: 100, 0.1: 100, 0.5: 100}, draw=draw), of_noise)["verdict"] for draw in range(draws)]
    wrong = sum(verdict != "undecided" for verdict in verdicts)
    assert wrong <= stats.binom.ppf(0.999, draws, 0.05)


def test_equivalence_on_the_edge_is_found_one_time_in_twenty() -> None:
    """A test that never errs there could never say "equivalent" either."""
    tie, draws = claim("equivalent", [0.1], [0.0], margin=0.2), 60
    found = sum(
        only(runs_of({0.0: 100, 0.1: 100.2}, draw=draw), tie)["verdict"] == "supported" for draw in range(draws)
    )
    assert 1 <= found <= stats.binom.ppf(0.999, draws, 0.05)


def test_equivalence_needs_a_narrow_interval_not_a_large_p() -> None:
    tie = claim("equivalent", [0.1], [0.0], margin="1%")
    tiny_but_real = runs_of({0.0: 100, 0.1: 100.05}, seeds=200)
    assert only(tiny_but_real, claim("higher", [0.1], [0.0]))["verdict"] == "supported"
    assert only(tiny_but_real, tie)["verdict"] == "supported", "real, and far smaller than the margin"
    vague = only(runs_of({0.0: 100, 0.1: 100}, seeds=3, spread=3), tie)
    assert vague["verdict"] == "undecided"
    assert "neither inside nor outside -1" in vague["reason"]
    for mean in (97, 103):
        assert only(runs_of({0.0: 100, 0.1: mean}), tie)["verdict"] == "contradicted"


def test_a_percentage_is_of_the_reference_and_a_number_is_in_units() -> None:
    runs = runs_of({0.0: 100, 0.1: 101.5})
    verdicts = {
        margin: only(runs, claim("equivalent", [0.1], [0.0], margin=margin))["verdict"] for margin in ("2%", 2, "1%", 1)
    }
    assert verdicts == {"2%": "supported", 2: "supported", "1%": "contradicted", 1: "contradicted"}
    assert only(runs.assign(**{PPL: runs[PPL] / 100}), claim("equivalent", [0.1], [0.0], margin="2%"))["verdict"] == (
        "supported"
    )


@pytest.mark.parametrize(
    ("mean", "verdict"), [(110, "supported"), (101, "contradicted"), (125, "contradicted"), (90, "contradicted")]
)
def test_a_claimed_size_is_held_to_the_interval(mean: float, verdict: str) -> None:
    assert only(runs_of({0.0: 100, 0.5: mean}), claim("higher", [0.5], [0.0], size=["5%", "15%"]))["verdict"] == verdict
    mirrored = runs_of({0.0: 100, 0.5: 200 - mean})
    assert only(mirrored, claim("lower", [0.5], [0.0], size=["5%", "15%"]))["verdict"] == verdict


def test_a_size_at_the_end_of_its_range_is_undecided() -> None:
    row = only(runs_of({0.0: 100, 0.5: 105}, spread=1), claim("higher", [0.5], [0.0], size=["5%", "15%"]))
    assert row["verdict"] == "undecided"


def test_a_claim_about_several_levels_is_as_strong_as_its_weakest_comparison() -> None:
    every = claim("higher", [0.1, 0.5], [0.0])
    assert only(runs_of({0.0: 100, 0.1: 103, 0.5: 103}), every)["verdict"] == "supported"
    row = only(runs_of({0.0: 100, 0.1: 100, 0.5: 103}), every)
    assert row["verdict"] == "undecided"
    assert "noise 0.1 vs 0.0" in row["compared"]
    assert only(runs_of({0.0: 100, 0.1: 97, 0.5: 103}), every)["verdict"] == "contradicted"
    alone = [
        only(runs_of({0.0: 100, 0.1: 101, 0.5: 103}), claim("higher", [level], [0.0]))["p"] for level in (0.1, 0.5)
    ]
    assert only(runs_of({0.0: 100, 0.1: 101, 0.5: 103}), every)["p"] == max(alone)


def test_the_lowest_are_refuted_only_by_a_level_that_beats_them_all() -> None:
    lowest = claim("lowest", [1.5, 2.0])
    between = only(runs_of({1.0: 101, 1.5: 100, 2.0: 103}), lowest)
    assert (between["verdict"], between["estimates"]) == ("undecided", "mixed")
    beaten = only(runs_of({0.5: 110, 1.0: 99, 1.5: 101, 2.0: 103}), lowest)
    assert (beaten["verdict"], beaten["estimates"]) == ("contradicted", "against")
    assert "noise 1.5 vs 1.0" in beaten["compared"], "the best that is named, against the best of the others"


def test_the_family_is_corrected_by_holm() -> None:
    runs = runs_of({0.0: 100, 0.1: 100, 0.5: 200, 1.0: 100})
    small = runs["seed"].map(dict(enumerate([1.0, 2.0, 3.0, 0.5, 1.5])))  # p = 0.02
    runs[PPL] += small.where(runs["noise"] == 0.1, 0)
    real, idle = claim("higher", [0.1], [0.0]), claim("higher", [1.0], [0.0])
    alone = only(runs, real)
    assert alone["p"] == alone["p Holm"]
    assert alone["verdict"] == "supported"
    table = judge(runs, [real, claim("higher", [0.5], [0.0]), *[idle] * 8])
    assert table["p Holm"].tolist() == pytest.approx(multipletests(table["p"], method="holm")[1].tolist())
    assert table["verdict"].tolist()[:2] == ["undecided", "supported"]
    assert table["reason"].iloc[0] == "supported before Holm's correction, not after it"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (claim("higher", [0.7], [0.0]), "noise=0.7 is in no run"),
        (claim("higher", [0.5], [0.2]), "noise=0.2 is in no run"),
        (claim("lowest", [0.0, 0.1, 0.5]), "no other level of noise"),
        (ClaimConfig(text="", metric="val/loss", factor="noise", levels=[0.1], than=[0.0], kind="lower"), "no run has"),
        (
            ClaimConfig(text="", metric=PPL, factor="router", levels=["a"], than=["b"], kind="lower"),
            "router=a is in no",
        ),
    ],
)
def test_what_is_not_there_leaves_a_claim_undecided(asked: ClaimConfig, reason: str) -> None:
    table = judge(runs_of({0.0: 100, 0.1: 102, 0.5: 105}), [asked, claim("higher", [0.5], [0.0])])
    assert table["verdict"].tolist() == ["undecided", "supported"]
    assert reason in table["reason"].iloc[0]
    assert table["n"].iloc[0] == 0
    assert reason in evidence_sentence(table.iloc[0])
    assert table["p Holm"].iloc[1] == table["p"].iloc[1], "a test that cannot be made costs the others nothing"


def test_a_level_that_never_changes_alone_is_undecided() -> None:
    runs = runs_of({0.0: 100, 0.1: 103}).assign(model=lambda table: table["noise"].map({0.0: "tiny", 0.1: "small"}))
    both = pd.concat([runs, runs.assign(noise=runs["noise"] + 1, model="base")])
    row = only(both, claim("higher", [0.1], [0.0]))
    assert row["reason"] == "no runs differ in noise alone"
    assert row["verdict"] == "undecided"


def test_one_seed_says_where_it_points_and_decides_nothing() -> None:
    row = only(runs_of({0.0: 100, 0.5: 150}, seeds=1), claim("lower", [0.5], [0.0]))
    assert (row["n"], row["verdict"], row["estimates"]) == (1, "undecided", "against")
    assert "one seed" in row["reason"]
    assert math.isnan(row["p"])


def test_too_few_seeds_name_the_smallest_effect_they_could_have_seen() -> None:
    runs = runs_of({0.0: 100, 0.5: 100.1}, seeds=3, spread=1)
    row = only(runs, claim("higher", [0.5], [0.0]))
    detectable = contrasts(runs, PPL, ["noise"])["detectable"].item()
    assert row["verdict"] == "undecided"
    assert f"(power 0.8) is {detectable:.2g}" in row["reason"]


def test_equal_runs_are_no_evidence() -> None:
    same = runs_of({0.0: 100, 0.5: 100}, spread=0)
    for asked in (claim("higher", [0.5], [0.0]), claim("equivalent", [0.5], [0.0], margin=1)):
        row = only(same, asked)
        assert row["verdict"] == "undecided"
        assert "no spread" in row["reason"]


def test_a_seed_that_lacks_a_run_is_left_out_and_named() -> None:
    runs = as_runs(read_published("noise_runs"))
    lost = (runs["noise"] == 0.5) & (runs["lb"] == 0.0) & (runs["seed"] == 44)
    row = only(runs.assign(**{PPL: runs[PPL].mask(lost)}), claim("higher", [0.5], [0.0]))
    assert row["n"] == 2
    assert row["reason"].startswith("left out, because a finished run is missing: seed 44")
    assert row["difference"] == pytest.approx(
        only(runs[runs["seed"] != 44], claim("higher", [0.5], [0.0]))["difference"]
    )


def test_causality_stands_beside_routers() -> None:
    runs = runs_of({"softk": 100, "expert_choice": 100}, factor="router")
    runs = runs.assign(causal=runs["router"] != "expert_choice")
    [asked] = [each for each in experiment_claims("experiment_c") if each.kind == "equivalent"]
    assert only(runs, asked)["compared"] == "router expert_choice (causal: no) vs softk (causal: yes)"


def test_contrasts_that_nobody_claimed_are_post_hoc() -> None:
    runs = as_runs(read_published("noise_runs"))
    table = contrasts(runs, PPL, ["noise", "lb"])
    left = contrasts_without_claim(table, [claim("higher", [0.5], [0.0])])
    assert set(zip(left["factor"], left["level"], strict=True)) == {("noise", 0.1), ("lb", 0.01)}
    assert contrasts_without_claim(table, [claim("lowest", [0.0])])["factor"].unique().tolist() == ["lb"]
    assert len(contrasts_without_claim(table.assign(metric="val/loss"), [claim("lowest", [0.0])])) == len(table)
    routers = pd.DataFrame(
        [{"metric": PPL, "factor": "router", "level": "b (causal: no)", "reference": "a (causal: yes)"}]
    )
    about = ClaimConfig(text="", metric=PPL, factor="router", levels=["a"], than=["b"], kind="lower")
    assert contrasts_without_claim(routers, [about]).empty


@pytest.fixture
def sweep(tmp_path: Path):
    """Return a function that writes the records of an experiment's cells, with made-up results."""

    def write(experiment: str, *overrides: str, seeds: tuple[int, ...] = (42, 43)) -> pd.DataFrame:
        composed = read_cells([f"experiment={experiment}", f"out={tmp_path}", "seed=0", *overrides]) or []
        cells = [
            cell._replace(config=replace(cell.config, seed=seed), folder=cell.folder / str(seed))  # quicker than Hydra
            for cell in composed
            for seed in seeds
        ]
        rng = np.random.default_rng(0)
        names = {each.metric for cell in cells for each in cell.config.claims}
        for cell in cells:
            cell.folder.mkdir(parents=True, exist_ok=True)
            write_run_record(cell, "running")
            change_record(cell.folder, status="finished")
            final = {name: rng.normal(100, 1) for name in names}
            write_metrics(cell.folder, final)
        return load_runs([tmp_path])

    return write


@pytest.mark.parametrize("experiment", WITH_CLAIMS)
def test_an_experiment_can_judge_all_that_it_claims(experiment: str, sweep) -> None:
    narrowed = NARROWED.get(experiment, [])
    runs = sweep(experiment, *narrowed, seeds=(42, 43, 44))
    [cell, *_] = read_cells([f"experiment={experiment}", *narrowed, "seed=42"]) or []
    planned = [(each, len(members)) for each, members in planned_claims(runs)]
    assert planned == [(each, len(runs)) for each in cell.config.claims]
    table = judge_planned(runs)
    assert table["claim"].tolist() == [each.text for each in experiment_claims(experiment)]
    assert (table["experiment"] == experiment).all()
    assert (table["n"] == 3).all()
    assert table["p Holm"].notna().all()


def test_claimed_metrics_exist_and_experiments_with_claims_are_known() -> None:
    claimed = {each.metric for name in WITH_CLAIMS for each in experiment_claims(name)}
    domains = {f"val/loss/{domain}" for domain in ("python", "cpp", "math")}
    assert all(lookup(metric) for metric in claimed)
    assert {metric for metric in claimed if metric.startswith("val/loss/")} <= domains
    assert [name for name in options("experiment") if "\nclaims:" in read_experiment(name)] == WITH_CLAIMS


def test_what_the_plan_says_of_stability_is_judged_beyond_chance() -> None:
    """An uneven load alone makes choices agree, so claims about stability use agreement beyond chance."""
    asked = {each.metric for name in ("spectra_ablation", "spectra_sweep_e") for each in experiment_claims(name)}
    assert "routing/consistency_kappa" in asked
    assert "routing/consistency" not in asked


def test_a_later_claim_is_judged_by_later_runs_alone(sweep) -> None:
    new = "claims=[{text: new, metric: val/perplexity, factor: noise, levels: [0.5], than: [0.0], kind: higher}]"
    sweep("noise_lb_seed", "lb=0.01", seeds=(42, 43, 44))
    runs = sweep("noise_lb_seed", "lb=0.01", new, seeds=(45, 46))
    table = judge_planned(runs).set_index("claim")
    assert table.loc["new", "n"] == 2
    assert table.loc["Noise 0.5 raises perplexity", "n"] == 3
    assert len(runs) == 15


def test_experiments_are_families_apart_and_runs_without_claims_make_none(sweep) -> None:
    few = ["noise=0.0,0.5", "lb=0.0,0.01"]
    runs = sweep("noise_lb_seed", "claims=[]", *few)
    assert planned_claims(runs) == []
    assert planned_claims(sweep("noise_lb_seed", *few)) == [], "a run that has begun takes no new claims"
    assert judge_planned(runs).empty
    runs = sweep("temperature_schedules")
    assert set(judge_planned(runs)["experiment"]) == {"temperature_schedules"}
    shutil.rmtree(Path(runs.loc[runs["experiment"] == "noise_lb_seed", "folder"].iloc[0]).parent.parent)
    runs = sweep("noise_lb_seed", *few)
    table = judge_planned(runs)
    assert set(table["experiment"]) == {"noise_lb_seed", "temperature_schedules"}
    for _, family in table.groupby("experiment"):
        assert family["p Holm"].tolist() == pytest.approx(multipletests(family["p"], method="holm")[1].tolist())


def test_a_claim_of_another_version_is_named(sweep) -> None:
    runs = sweep("noise_lb_seed", "lb=0.0", "noise=0.0")
    path = Path(runs["folder"].iloc[0]) / "run.json"
    path.write_text(path.read_text().replace('"kind": "lowest"', '"sort": "lowest"'))
    with pytest.raises(ValueError, match=r"cannot read the claim: .*sort"):
        planned_claims(runs)


def test_claims_are_no_part_of_a_runs_identity_or_its_table(sweep, tmp_path: Path) -> None:
    one, two = ((read_cells([f"out={tmp_path}", *extra]) or [])[0] for extra in ([], [given()]))
    assert one.folder == two.folder
    assert one.config.identity() == two.config.identity()
    assert "claims" not in sweep("noise_lb_seed", "lb=0.0", "noise=0.0")


def given(**changes: Any) -> str:
    fields = {"text": "x", "metric": "val/loss", "factor": "lb", "levels": [0.01], "than": [0.0], "kind": "higher"}
    text = ",".join(f"{name}:{json.dumps(value)}" for name, value in (fields | changes).items() if value is not None)
    return f"claims=[{{{text}}}]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "text: .* missing mandatory value"),
        ({"sort": "x"}, "Key 'sort' not in 'ClaimConfig'"),
        ({"kind": "hihger"}, r"claims\[0\].kind=hihger: must be one of .*; nearest: higher"),
        ({"metric": "loss"}, r"claims\[0\].metric=loss: must be one of val, "),
        ({"factor": "nois"}, r"unknown factor of claims\[0\] 'nois'; nearest: noise"),
        ({"levels": []}, r"claims\[0\].levels=\[\]: must be a list of at least one"),
        ({"than": []}, r"claims\[0\].than=\[\]: must be a list of at least one"),
        ({"than": [0.01]}, r"claims\[0\].than=\[0.01\]: must be without \[0.01\]"),
        ({"kind": "lowest"}, r"claims\[0\].than=\[0.0\]: must be empty: lowest compares with all"),
        ({"kind": "equivalent"}, r"claims\[0\].margin=None: must be given, such as 1%"),
        ({"margin": "1%"}, r"claims\[0\].margin=1%: must be left out"),
        ({"kind": "equivalent", "margin": "-1%"}, r"claims\[0\].margin=-1%: must be positive"),
        ({"kind": "equivalent", "margin": "one"}, "amount=one: must be a finite number, or a text such as 5%"),
        ({"size": ["15%", "5%"]}, r"claims\[0\].size=.*: must be positive and rising"),
        ({"size": ["5%"]}, r"claims\[0\].size=.*: must be two amounts"),
    ],
)
def test_wrong_claims_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_cells([given(**changes)])
    assert "\n" not in str(raised.value)


def test_right_claims_are_taken() -> None:
    for changes in ({}, {"factor": "variant"}, {"factor": "router.temp"}, {"kind": "equivalent", "margin": 0.5}):
        assert read_cells([given(**changes)])
