"""Figures and JSON reports of the temperature study."""
