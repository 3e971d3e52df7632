"""HR-Bench, graded by letter and without a judge."""
