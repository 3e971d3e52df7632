"""Decoder layers over a KV cache: prefixes, attention rows, generation."""
