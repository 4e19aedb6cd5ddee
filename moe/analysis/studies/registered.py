"""The studies that add something to the report. This is the one place where a study plugs in.

To add a study: write a module in this folder with a `Study` (`moe.analysis.report.study`), and append it here.
"""

from moe.analysis.report.study import Study
from moe.analysis.studies.noise import NOISE_STUDY
from moe.analysis.studies.routing_bench import ROUTING_BENCH
from moe.analysis.studies.temperature.section import TEMPERATURE_STUDY

STUDIES: tuple[Study, ...] = (NOISE_STUDY, ROUTING_BENCH, TEMPERATURE_STUDY)
