"""Provenance of a run: versions, weights, arguments, fingerprints of data and scorers."""
