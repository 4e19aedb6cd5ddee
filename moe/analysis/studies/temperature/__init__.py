"""The temperature study's own figures and reports."""
