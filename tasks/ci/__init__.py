"""Subsets for CI of the harness's own tasks."""
