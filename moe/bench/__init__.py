"""Benchmarks: `python -m moe.bench layer|step|profile|growth|dispatch|sweep|analyze`. docs/benchmarks.md has the results."""
