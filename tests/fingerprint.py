"""Trains every router, schedule, variant and setting for a few steps and prints the SHA-256 of each run's weights.

Use it for a change of the code that must not change results. On one machine, with the same versions of the libraries,
it prints the same lines before and after the change:

    python tests/fingerprint.py > before.txt    # then change the code
    python tests/fingerprint.py | diff before.txt - && echo equal
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}

SMALL = """
    model.dim=32 model.heads=2 model.layers=2 model.ffn=32 model.num_experts=4 model.dense_ffn=64 precision=fp32
    data=text data.source.column=text data.source.domain=half data.tokenizer=bpe
    data.seq_len=32 data.vocab_size=400 data.max_val_blocks=12
    steps=4 batch_size=4 grad_accum=2 eval_every=2 save_every=2 logger.mode=disabled
""".split()

# One sweep per entry. Every cell is trained for a few steps.
SWEEPS = [
    "router={routers}",
    "router={routers} capacity=1.0 noise=0.5 lb=0.01 z=0.001",
    "variant={variants}",
    "router=temperature schedule={schedules} router.temp=2.0",
    "router=top2,gumbel schedule=cosine schedule.knob=noise schedule.start=1.0 noise=0.1",
    "router=top2,gumbel schedule=step schedule.knob=noise schedule.start=1.0 schedule.middle=0.5 noise=0.1",
    "router=topk,expert_choice capacity=0.75 drop=position,score,random",
    "router=topk optimizer=muon,adamw",
    "router=sigmoid_bias,spectra optimizer=adamw model.dropout=0.1",
    "router=topk lb_global=0.01 lb_sequence=0.01 router_entropy=0.01 gate_variance=0.01 simbal=0.01"
    " output_orthogonality=0.01 seed=1,2",
    "router=topk model.shared_experts=1 model.expert=silu,swiglu model.first_k_dense_replace=1 grad_accum=1",
]

# The keys in which cells of a sweep can differ.
NAMES = ("router", "schedule", "variant", "optimizer", "capacity", "drop", "seed")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus" / "topics.jsonl"  # the validation split depends on this folder's name
        corpus.parent.mkdir()
        rows = [{"text": text, "half": "early" if name < "d" else "late"} for name, text in sorted(topics.items())]
        corpus.write_text("\n".join(json.dumps(row) for row in rows))
        data = [f"data.source.paths=[{corpus}]", f"data.cache={folder}/cache"]
        groups = {f"{group}s": ",".join(options(group)) for group in ("router", "schedule", "variant")}
        for number, sweep in enumerate(SWEEPS):
            print_sweep([*SMALL, *data, *sweep.format(**groups).split()], Path(folder) / str(number), sweep)


def options(group: str) -> list[str]:
    """Return the options in a folder of conf/ that need no further key, sorted."""
    found = (ROOT / "conf" / group).glob("*.yaml")
    return sorted(path.stem for path in found if "???" not in path.read_text())


def print_sweep(overrides: list[str], out: Path, title: str) -> None:
    """Train a sweep below `out`, and print a line for each of its runs: digest, sweep, run."""
    overrides = list({override.split("=")[0]: override for override in overrides}.values())  # the last value wins
    command = [sys.executable, "train.py", "-m", *overrides, f"out={out}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        print(f"# exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    lines = []
    for path in out.rglob("run.json"):
        record, weights = json.loads(path.read_text()), path.parent / "model" / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else record["status"]
        chosen = {**record["config"], **record["choices"]}
        lines.append((" ".join(f"{name}={chosen[name]}" for name in NAMES), digest))
    # Sorted by settings, because folder names depend on the temporary folder, and so does their order.
    for run, digest in sorted(lines):
        print(f"{digest}  {title}: {run}", flush=True)


if __name__ == "__main__":
    main()
