"""Benchmarks with their scorers, the judge, answer files, statistics."""
