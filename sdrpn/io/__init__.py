"""Files: images, checkpoints, questions, atomic writes, resumable jobs."""
