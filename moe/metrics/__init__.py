"""Catalog of all metrics, and the formulas of routing metrics over the sums that a model measures."""
