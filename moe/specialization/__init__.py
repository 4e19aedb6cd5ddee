"""Measure on finished runs how the experts differ: `python -m moe.specialization FOLDER ...`."""
