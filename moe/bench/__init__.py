"""Benchmarks: `python -m moe.bench layer|step|profile|growth|dispatch|sweep|analyze`. Results: docs/benchmarks.md."""
