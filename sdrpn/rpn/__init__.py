"""The region proposal network and its checkpoints."""
