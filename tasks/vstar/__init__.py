"""V* bench, scored by category and over all questions."""
