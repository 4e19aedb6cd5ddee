"""The entries of the catalog of metrics, a file for each group or two."""
