"""Benchmarks: what decode costs, beside everything that a user could do instead."""
