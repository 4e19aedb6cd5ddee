"""The report: its inputs, sections, and the two forms that it is written in."""
