"""Checks of prose and source, run by `make lint`: `python -m pytest tools/lint/*.py`."""
