"""Sections of the report: each file holds the functions that turn `ReportInputs` into report blocks."""
