"""Tests that exported models are plain models of transformers with the same logits, and that others are refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from exported_models import ROUTERS, make, upcycle
from huggingface_hub import ModelCard
from run_folders import write_record
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.options import CONF
from moe.data.tokenizer import train_bpe
from moe.foreign import export
from moe.foreign.anatomy import anatomy_of
from moe.foreign.export import Difference, compare, compared_tokens, convert, expressing, to_transformers
from moe.foreign.export_command import main
from moe.foreign.folder import notes
from moe.foreign.target_weights import weights_of
from moe.foreign.targets import TARGETS
from moe.launch.run import run
from moe.model.causal_lm import MoEForCausalLM

SOFTMAX = {"mixtral", "granitemoe", "qwen2_moe", "olmoe", "qwen3_moe"}
DEEP = {"shared_experts": 2, "first_k_dense_replace": 1}
EXPRESSED: list[tuple[str, dict[str, Any], set[str]]] = [
    ("topk", {}, SOFTMAX),
    ("topk", {"tie_word_embeddings": False, "num_key_value_heads": 1}, SOFTMAX),
    ("topk", {"embed_scale": False, "num_key_value_heads": 6}, SOFTMAX),
    ("topk", {"head_dim": 6}, SOFTMAX - {"olmoe"}),
    ("topk", {"attention_bias": True}, {"granitemoe", "olmoe", "qwen3_moe"}),
    ("topk", {"first_k_dense_replace": 1}, {"qwen2_moe", "qwen3_moe"}),
    ("topk", DEEP, {"qwen2_moe"}),
    ("topk", DEEP | {"shared_gate": True}, {"qwen2_moe"}),
    ("topk", {"latent_dim": 12}, set()),
    ("topk", {"router_input": "attention"}, set()),
    ("topk", {"router_precision": "bf16"}, set()),
    ("topk", {"expert": "silu"}, {"gpt_oss"}),
    ("topk", {"expert": "silu", "attention_bias": True, "embed_scale": False}, {"gpt_oss"}),
    ("switch", {}, {"qwen2_moe", "olmoe", "qwen3_moe"}),
    ("softmax_all", {}, {"qwen2_moe", "olmoe", "qwen3_moe"}),
    ("uniform", {}, {"granitemoe"}),
    ("uniform", {"expert": "silu"}, {"gpt_oss"}),
    ("random", {}, {"granitemoe"}),
    ("temperature", {}, SOFTMAX),
    ("gumbel", {}, SOFTMAX),
    ("biased", {}, {"glm4_moe", "deepseek_v3"}),
    ("biased_raw", DEEP, {"glm4_moe", "deepseek_v3"}),
    ("groups", {"num_experts": 6}, set()),
    ("topk", {"experts_by_layer": "1:4"}, set()),
    ("biased_raw", {"experts_by_layer": "1:4"}, {"glm4_moe", "deepseek_v3"}),
    ("biased", {"experts_by_layer": "0:7"}, {"glm4_moe", "deepseek_v3"}),
]


@pytest.mark.parametrize(("router", "changes", "targets"), EXPRESSED)
def test_the_targets_that_express_a_model_are_known_and_the_first_has_its_logits(
    router: str, changes: dict[str, Any], targets: set[str]
) -> None:
    model = make(router, **changes)
    found = [target.name for target in expressing(anatomy_of(model), list(TARGETS.values()))]
    assert set(found) == targets
    if targets:
        exported = to_transformers(model, "auto")
        assert exported.config.model_type == found[0]
        assert compare(model, exported).relative < 1e-5


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("mixtral", "gpt_oss", "glm4_moe")])
def test_a_target_that_others_precede_has_the_logits_of_what_it_expresses_too(target: str) -> None:
    """One key head, one for each head, and something between; tied and untied; with shared experts where they fit."""
    router, changes, _ = [case for case in EXPRESSED if target in case[2]][-1]
    for more in ({"num_key_value_heads": 1}, {"num_key_value_heads": 6, "tie_word_embeddings": False}):
        model = make(router, **changes | more)
        assert compare(model, to_transformers(model, target)).relative < 1e-5


@pytest.mark.parametrize(
    ("router", "changes", "target", "message"),
    [
        ("topk", {}, "mixtrall", r"--to=mixtrall: must be one of auto, mixtral, .*; nearest: mixtral"),
        (
            "biased",
            {"expert": "silu"},
            "glm4_moe",
            r"--to glm4_moe: model.expert=silu: its experts are of the form model.expert=swiglu or geglu",
        ),
        (
            "biased",
            {"expert": "silu"},
            "auto",
            r"--to auto: router=SigmoidBias\(k=3\): its rule \(.*\) is that of glm4_moe, deepseek_v3, but"
            r" model.expert=silu: its experts are of the form model.expert=swiglu or geglu;"
            r" with the nearest rule, gpt_oss with .*",
        ),
        ("topk", DEEP, "mixtral", r"--to mixtral: model.first_k_dense_replace=1: all its layers have experts; .*"),
        (
            "topk",
            {"experts_by_layer": "1:4"},
            "mixtral",
            r".*: model.experts_by_layer=1:4: all its layers have one number.*",
        ),
        (
            "topk",
            {"experts_by_layer": "1:4"},
            "auto",
            r"--to auto: router=TopK\(k=3\): .* but model.experts_by_layer=1:4: all its layers have one number of "
            r"experts; .*; --to gguf expresses this model",
        ),
        (
            "biased_groups",
            {"num_experts": 6, "experts_by_layer": "1:4"},
            "glm4_moe",
            r"--to glm4_moe: model.experts_by_layer=1:4: all its layers have one number of experts, and more of them "
            r"would change the groups or the weights",
        ),
        ("topk", {"shared_experts": 2}, "granitemoe", r".* model.shared_experts=2: it has no shared experts; .*"),
        (
            "softmax_all",
            {},
            "mixtral",
            r".*: router=TopK\(k=3, gate=softmax_all\): mixtral does not follow its rule \(top 3 of the softmax scores,"
            r" the scores themselves as weights\); with the nearest rule, mixtral with top 3 of the softmax scores,"
            r" weights that sum to 1, the logits would be off by up to [\d.]+, where the largest logit is [\d.]+; "
            r"--to qwen2_moe expresses this model",
        ),
        (
            "relu",
            {},
            "auto",
            r"--to auto: router=ReLU\(\): what it does in evaluation is not the rule of any target; with the nearest"
            r" rule, \w+ with top 2 .*, the logits would be off by up to [\d.]+, where the largest logit is [\d.]+",
        ),
        (
            "groups",
            {"num_experts": 6},
            "auto",
            r"--to auto: router=GroupLimited\(.*\): no target follows its rule \(top 2 of the softmax scores, weights"
            r" that sum to 1, the best 1 of 2 groups\); with the nearest rule, .*; --to gguf expresses this model",
        ),
        ("hash", {}, "auto", r".*; no target is near, because this router has no matrix that gives the scores .*"),
        ("cosine", {}, "auto", r".*; no target is near, because this router has no matrix that gives the scores .*"),
    ],
)
def test_a_model_that_the_target_does_not_express_is_refused_in_one_line(
    router: str, changes: dict[str, Any], target: str, message: str
) -> None:
    """The line names the key, and if the router alone is in the way, how far the nearest rule would be off."""
    with pytest.raises(ConfigError, match=f"^{message}$"):
        to_transformers(make(router, **changes), target)


def test_experts_that_were_added_get_no_token_and_the_card_says_so() -> None:
    model = make("biased", experts_by_layer="1:4")
    exported = to_transformers(model)
    full, filled = (layer.mlp for layer in exported.model.layers)
    assert len(full.gate.weight) == len(filled.gate.weight) == 5
    assert filled.experts.down_proj[4].count_nonzero() == 0
    assert filled.gate.e_score_correction_bias[4] < -1e29
    assert any("`model.experts_by_layer=1:4`" in note for note in notes(model, exported))
    assert notes(make("biased"), exported) == []


def test_an_export_changes_neither_the_model_nor_the_random_numbers() -> None:
    model = make("uniform")
    before, state = {name: w.clone() for name, w in model.state_dict().items()}, torch.get_rng_state()
    to_transformers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_the_texts_that_are_compared_are_longer_than_the_positions_of_a_small_model_and_short_for_a_large_one() -> None:
    assert compare(make("topk"), make("topk")) == (0, compare(make("topk"), make("topk")).largest, 64 + 32)
    assert 32 < compared_tokens(make("topk", vocab_size=2**20)) < 64 + 32
    assert compared_tokens(make("topk", vocab_size=2**22, max_position_embeddings=8)) == 32
    assert compared_tokens(make("topk", max_position_embeddings=2**20)) == int((2**26 / 6) ** 0.5)


def test_a_text_in_which_two_scores_are_equal_but_for_rounding_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other text decides, also against the export."""
    model = make("topk")

    def other(first: MoEForCausalLM, found: torch.nn.Module, *, seed: int = 0) -> Difference:
        return Difference(1.0, 1.0, 96) if seed == 0 else compare(first, found, seed=seed)

    monkeypatch.setattr(export, "compare", other)
    assert convert(model, "mixtral")[1].relative < 1e-5
    monkeypatch.setattr(export, "weights_of", lambda *a, **k: {n: 1.1 * w for n, w in weights_of(*a, **k).items()})
    with pytest.raises(ConfigError, match=r"^--to mixtral: the logits of mixtral are off by up to .*"):
        convert(model, "mixtral")


def test_a_model_in_bfloat16_stays_so_if_its_weights_do(tmp_path: Path) -> None:
    """Its router, which computes in fp32, may have weights that bfloat16 does not hold."""
    model = make("topk", embed_scale=False)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    for layer in model.moe_layers:
        layer.router.weight.data = make("topk").moe_layers[0].router.weight.data
    assert to_transformers(model, "mixtral").dtype == torch.float32
    for layer in model.moe_layers:
        layer.router.weight.data = layer.router.weight.data.bfloat16().float()
    assert to_transformers(model, "mixtral").dtype == torch.bfloat16


PLAIN = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

given = torch.load(sys.argv[1])
results = {}
for folder in sorted(Path(sys.argv[1]).parent.iterdir()):
    if folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder)
        logits = model(**given).logits
        results[folder.name] = logits.detach(), model.generate(**given, max_new_tokens=8, do_sample=False)
assert "moe" not in sys.modules
torch.save(results, sys.argv[2])
"""


def test_plain_transformers_loads_each_target_with_the_same_logits_and_generates_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that does not have this project reads two texts, of which one is padded on the left, with a cache."""
    models = {target: make(router, **changes) for router, changes, targets in EXPRESSED for target in targets}
    assert models.keys() == TARGETS.keys()
    parents = {"qwen3_moe": "qwen3", "qwen2_moe": "qwen2 with a window", "mixtral": "mistral with a window"}
    given = [(target, target, model) for target, model in models.items()]
    given += [(parent, target, upcycle(parent, "topk")) for target, parent in parents.items()]
    given.append(("gemma", "granitemoe", upcycle("gemma", "topk")))
    models = {name: model for name, _, model in given}
    folders = tmp_path / "exported"
    folders.mkdir()
    for name, target, model in given:
        model.save_pretrained(tmp_path / f"saved-{name}")
        assert main([str(tmp_path / f"saved-{name}"), "--to", target, "--out", str(folders / name)]) == 0
        assert json.loads((folders / name / "config.json").read_text())["model_type"] == target
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    torch.save({"input_ids": ids, "attention_mask": mask}, folders / "given")
    command = [sys.executable, "-I", "-c", PLAIN, str(folders / "given"), str(tmp_path / "results")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (logits, generated) in torch.load(tmp_path / "results").items():
        model = models[name]
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(logits[mask.bool()], expected, rtol=1e-4, atol=1e-4, msg=name)
        same = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert torch.equal(generated, same), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved model with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = train_bpe(["some words to learn"], 300)
    make("topk", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_model_of_a_run_is_exported_with_tokenizer_generation_settings_and_card(
    cell: Callable[..., Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card says which run it was, from which weights, and its loss. A second export changes nothing."""
    trained = cell("model.expert=swiglu", "model.layers=1", "steps=2", "capacity=1.25")
    run(trained)
    out = tmp_path / "exported"
    capsys.readouterr()
    assert main([str(trained.folder), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: mixtral, logits differ by up to ")
    assert printed.err.startswith("capacity=1.25: the exported model drops no token")
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    original = AutoTokenizer.from_pretrained(trained.folder / "model")
    text = "if x in range(12):\n    pass"
    assert tokenizer(text) == original(text)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    inputs = tokenizer(text, return_tensors="pt")
    assert model.generate(**inputs, min_new_tokens=3, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    metrics = json.loads((trained.folder / "metrics.json").read_text())["final_metrics"]
    assert f"- val/loss: {metrics['val/loss']:.6g} nats" in card.text
    assert "- run: " in card.text
    tokens = trained.config.data.seq_len + 32
    assert f"compared with those of the original in fp32, on two texts of {tokens} random tokens. They " in card.text
    assert "`model.safetensors`: sha256 `" in card.text
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main([str(trained.folder), "--to", "qwen2_moe", "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith("must be a new name; this one exists, and nothing is overwritten\n")
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_a_model_that_transformers_has_saved_is_exported_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its own architecture, the files of weights and tokenizer are the same, byte for byte, also in bf16."""
    given, same, other = tmp_path / "given", tmp_path / "same", tmp_path / "other"
    source: Any = tiny("mixtral", vocab_size=300).bfloat16()
    source.generation_config.max_new_tokens = 7
    source.save_pretrained(given)
    train_bpe(["some words to learn"], 300).save_pretrained(given)
    capsys.readouterr()
    assert main([str(given), "--out", str(same)]) == 0
    printed = capsys.readouterr()
    assert (printed.out.startswith(f"{same}: mixtral, "), printed.err) == (True, "")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (same / name).read_bytes() == (given / name).read_bytes(), name
    assert main([str(given), "--to", "qwen3_moe", "--out", str(other)]) == 0
    overflow = f"{other}: compute in fp32 or bf16; in fp16 the numbers between the layers overflow\n"
    assert capsys.readouterr().err == overflow
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    before, after = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (given, other))
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-4)
    assert (
        "A mixtral, written by moe-routing as a model of the architecture qwen3_moe."
        in (other / "README.md").read_text()
    )


def test_weights_are_cut_into_files_of_the_wanted_size(saved: Path, tmp_path: Path) -> None:
    """A single tensor may be larger than a file should be."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([str(saved), "--out", str(whole)]) == 0
    assert main([str(saved), "--out", str(cut), "--max-shard-size", "20KB"]) == 0
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) > 3
    assert sum(file.stat().st_size > 20_000 + 5_000 for file in files) == 2  # embedding and output; 5 kB for headers
    a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere --out new", "no folder nowhere"),
        ("empty --out new", "empty: is neither the folder of a run nor a saved model"),
        (". --out new", r"\.: is neither .* a saved model; it has runs, such as old: name one of them"),
        ("torn/config.json --out new", "torn/config.json: is a file, not a folder"),
        (
            "sweep/cell --out new",
            "sweep/cell: this run has no saved model; there is no sweep/cell/model, and it is interrupted, with .*",
        ),
        ("old --out new", "old/run.json: config.router is missing; delete the folder .*"),
        ("untold --out new", "untold: its tokenizer cannot be read: there is no tokenizer_config.json"),
        ("plain --out new", "plain: it has no weights in model.safetensors or .*"),
        ("dense --out new", "dense: config.json has none of num_local_experts, .*: no Mixture of Experts"),
        ("unknown --out new", "model_type in config.json of unknown=null: must be moe_routing, or that of a causal .*"),
        ("imported --out new", "imported: model_type in config.json.imported=evil: must be that of a causal .*"),
        ("adapted --out new", "adapted: adapter._target_=os.system: what code outside of this project does is unknown"),
        ("inner --out new", r"inner: .*; see docs/security.md\)"),
        ("nan --out new", "nan: model.norm.weight has numbers that are not finite"),
        ("nan --to gguf --out new", "nan: model.norm.weight has numbers that are not finite"),
        ("{saved} --out {saved}/new", "--out=.*/new: must be outside of .*, because a run has the files of its .*"),
        ("{saved} --out torn", "--out=torn: must be a new name; this one exists, and nothing is overwritten"),
        ("{saved} --out new --max-shard-size 0", "--max-shard-size=0: must be a number of bytes, .* such as 5GB"),
        ("{saved} --out new --max-shard-size 5XB", "--max-shard-size=5XB: must be a number of bytes, .* such as 5GB"),
        ("{saved} --to gguf --out new --max-shard-size 5GB", "--max-shard-size=5GB: must be left out with --to gguf.*"),
        ("{saved} --to jamba --out new", "--to=jamba: must be one of auto, mixtral, .*, gguf"),
        ("{saved} --to mixtrel --out new", "--to=mixtrel: must be one of auto, .*; nearest: mixtral"),
        ("{saved} --out below/new", "--out=below/new: must be in a folder that exists; .*/below does not"),
        ("{saved} --to glm4_moe --out new", "--to glm4_moe: router=TopK.*; --to mixtral expresses this model"),
        ("torn --out new", "torn: cannot be read as a saved model (.*)"),
        ("strange --out new", "strange: router._target_=os.system: what code outside of this project does is unknown"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: str,
    message: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights that are torn, and a router that is a class of a stranger, are among it."""
    monkeypatch.chdir(tmp_path)
    make("topk").save_pretrained("torn")
    weights = Path("torn/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    make("topk").save_pretrained("strange")
    config = json.loads(Path("strange/config.json").read_text())
    config["router"]["_target_"] = "os.system"
    Path("strange/config.json").write_text(json.dumps(config))
    for name, key, value in (
        ("imported", "imported", {"model_type": "evil"}),
        ("adapted", "adapter", {"_target_": "os.system"}),
        ("inner", "router", {"_target_": "moe.files.sha256"}),
    ):
        shutil.copytree("strange", name)
        AutoTokenizer.from_pretrained(saved).save_pretrained(name)  # about which transformers could print a line
        Path(name, "config.json").write_text(json.dumps(config | {"router": ROUTERS["topk"]} | {key: value}))
    LlamaConfig().save_pretrained("dense")
    Path("empty").mkdir()
    Path("unknown").mkdir()
    Path("unknown/config.json").write_text("{}")
    broken = make("topk")
    broken.model.norm.weight.data[3] = torch.nan
    broken.save_pretrained("nan")
    AutoTokenizer.from_pretrained(saved).save_pretrained("nan")
    MixtralConfig().save_pretrained("plain")
    Path("sweep/cell").mkdir(parents=True)
    write_record(Path("sweep/cell"), status="interrupted", config={"save_model": "last", "seed": 1})
    Path("old/model").mkdir(parents=True)
    write_record(Path("old"), status="interrupted", config={"seed": 1})
    shutil.copytree("nan", "untold")
    Path("untold/tokenizer_config.json").unlink()
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()  # transformers shows its progress
    assert main(words.format(saved=saved).split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"moe export: {message}", line), line
    assert "trust_remote_code" not in line or "only in Python" in line  # the command has no such option
    assert sorted(tmp_path.iterdir()) == before


def test_the_page_about_foreign_models_names_every_target_and_every_router() -> None:
    page = (CONF.parent / "docs" / "foreign-models.md").read_text(encoding="utf-8")
    routers = [path.stem for path in (CONF / "router").glob("*.yaml")]
    assert not [name for name in (*TARGETS, *routers) if f"`{name}`" not in page]
