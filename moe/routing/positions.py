"""The number of parts into which positions in a sequence are divided. This module does not import torch."""

DECILES = 10  # tenths of a sequence's length
