"""Write tables, statistics, figures and a report: `python analyze.py multirun/noise_lb_seed --out analysis`."""

import sys

from moe.__main__ import carry_out

if __name__ == "__main__":
    sys.exit(carry_out("analyze"))
