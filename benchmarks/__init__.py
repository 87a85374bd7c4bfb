"""Benchmarks: `python -m benchmarks [NAME ...]`. Each prints the peer, the limit and us from one run."""
