"""Write tables, statistics, figures and a report: `python analyze.py multirun/noise_lb_seed --out analysis`."""

import sys

from moe.analysis.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
