"""Results of lmms-eval, read with suspicion, compared, held to a baseline and asked again."""
