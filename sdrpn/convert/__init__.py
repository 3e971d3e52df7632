"""Conversion of published files: pickled labels, LLaVA-1.5 in the original layout."""
