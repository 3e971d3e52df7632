"""What others published -> ours: RPN checkpoints, pickled labels, LLaVA-1.5 in its first layout."""
