"""Fuzzers, run from the root of the repository: `python -m fuzz.results`."""
