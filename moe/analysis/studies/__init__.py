"""Figures, tables and data of single source studies."""
