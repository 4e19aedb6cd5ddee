"""Figures of the temperature study."""
