"""How the embedded model and the benchmark `tiny_vstar` were made; none of it ships."""
