"""Train one model, or a grid of models: `python train.py [-m] [key=value ...]`. `--help` lists what can be set."""

import sys

from moe.launch.train import main

if __name__ == "__main__":
    sys.exit(main())
