"""Benchmarks: `python -m moe.bench layer|step|growth|dispatch|sweep|analyze`. docs/benchmarks.md has the results."""
