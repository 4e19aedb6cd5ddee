"""List the studies that extend the report. The report learns of a study only from this list.

To add a study, write a module in this folder with a `Study` (`moe.analysis.report.study`), and append it here.
"""

from moe.analysis.report.study import Study
from moe.analysis.studies.noise import NOISE_STUDY
from moe.analysis.studies.routing_bench import ROUTING_BENCH
from moe.analysis.studies.temperature.section import TEMPERATURE_STUDY

STUDIES: tuple[Study, ...] = (NOISE_STUDY, ROUTING_BENCH, TEMPERATURE_STUDY)
