"""What a run was made of: versions, weights, arguments, and fingerprints of data and scorers."""
