"""Figures: each function draws one figure from a table. `drawing` joins a figure with its name and caption."""
