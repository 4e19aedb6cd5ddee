"""How many seeds the claims of an experiment need, and what they cost: `moe plan`."""
