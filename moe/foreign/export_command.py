"""Write the model of a run as a model that other programs load: `python -m moe export RUN --to mixtral --out DIR`.

RUN is the folder of a run, of a saved model, or of a Mixture of Experts that transformers has saved. The new folder has
weights, tokenizer, generation settings and a card. Plain transformers loads it without this project, and its logits are
those of the run. A model that the architecture cannot express is refused, with the reason and the nearest architecture
that can. `--to auto` takes the first that can; an imported model's own architecture comes first. `--to gguf` writes a
file for llama.cpp. docs/foreign-models.md explains all of it.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the hub and of transformers

from moe.checks import one_of, printable
from moe.foreign.export import convert
from moe.foreign.folder import (
    GGUF,
    SCALED,
    Source,
    check_new,
    check_shards,
    notes,
    read_source,
    write_folder,
    write_gguf_folder,
)
from moe.foreign.gguf import require_package
from moe.foreign.targets import TARGETS
from moe.options import OneLineParser
from moe.program import ended, program

WAYS = ("auto", *TARGETS, "gguf")


def main(command: list[str] | None = None) -> int:
    parser = OneLineParser(prog=program("moe export"), description=__doc__)
    parser.add_argument(
        "model", type=Path, help="folder of a run, of a saved model, or of a Mixture of Experts of transformers"
    )
    parser.add_argument("--to", default="auto", help=f"{', '.join(WAYS)} (auto)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder to write")
    shards = "largest size of one file of weights, such as 5GB; otherwise as transformers cuts them"
    parser.add_argument("--max-shard-size", metavar="SIZE", help=shards)
    arguments = parser.parse_args(command)
    try:
        check_shards(arguments.max_shard_size, arguments.to)
        if arguments.to == "gguf":
            require_package()
        check_new(arguments.out)
        source = read_source(arguments.model)
        check_new(arguments.out, source.run or source.folder)
        one_of("--to", arguments.to, dict.fromkeys((*WAYS, source.imported_from or "auto")))
        capacity = None if source.record is None else source.record.typed_config().capacity
        done = _export(source, arguments.to, arguments.out, arguments.max_shard_size)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {printable(str(error))}", file=sys.stderr)
        return 2
    if source.tokenizer is None:
        print(f"{source.folder}: has no tokenizer, so {arguments.out} has none", file=sys.stderr)
    if capacity is not None:
        print(
            f"capacity={capacity:g}: the exported model drops no token, as in the run's val/ metrics; the limit acted "
            "in training and in val_capacity/ alone",
            file=sys.stderr,
        )
    print(f"{arguments.out}: {done}")
    return 0


def _export(source: Source, to: str, out: Path, shards: str | None) -> str:
    """Write the new folder, and return what was written."""
    model = source.model()
    if to == "gguf":
        return f"{GGUF}, architecture {write_gguf_folder(model, source, out)}"
    exported, difference = convert(model, to)
    remarks = notes(model, exported)
    write_folder(exported, source, out, *remarks, difference=difference, shards=shards)
    if SCALED in remarks:
        print(f"{out}: compute in fp32 or bf16; in fp16 the numbers between the layers overflow", file=sys.stderr)
    return f"{exported.config.model_type}, logits differ by up to {difference}"


if __name__ == "__main__":
    sys.exit(ended(main, "moe export"))
