"""Scripts of this repository, run from its root: `python -m tools.tiny_vstar.build`."""
