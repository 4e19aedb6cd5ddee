"""The temperature study's own figures and JSON reports."""
