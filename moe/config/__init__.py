"""The configuration: its types, ranges and defaults, and what can be chosen."""
