"""Benchmarks, run as `python -m moe.bench layer|step|dispatch`; what they found is in docs/benchmarks.md."""
