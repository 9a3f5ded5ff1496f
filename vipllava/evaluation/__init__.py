"""Benchmarks, judges and the statistics they report."""
