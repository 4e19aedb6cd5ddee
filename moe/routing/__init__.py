"""Routing decisions, their dispatch under a capacity limit, their auxiliary losses, and the sums for metrics."""
