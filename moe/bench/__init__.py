"""Benchmarks: `python -m moe.bench layer|step|growth|dispatch|sweep|analyze`; findings are in docs/benchmarks.md."""
