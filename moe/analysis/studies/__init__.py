"""Figures, tables and data of single source studies. `registered` lists the studies that extend the report."""
