"""The number of parts into which positions in a sequence are divided. Imports nothing, so everybody may read it."""

DECILES = 10  # tenths of a sequence's length
