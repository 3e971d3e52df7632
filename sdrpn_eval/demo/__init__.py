"""The embedded demonstration: a tiny LLaVA, its scenes, its training and its benchmark."""
