"""Train one model, or a grid of models: `python train.py [-m] [key=value ...]`. `--help` lists what can be set."""

import sys

from moe.__main__ import carry_out

if __name__ == "__main__":
    sys.exit(carry_out("train"))
