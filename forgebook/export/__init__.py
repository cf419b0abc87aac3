"""Leaving the project: merged weights, the hub, GGUF."""
