"""From a command line to finished runs: reading it, sweeping, running one cell."""
