"""Weights, tokenizers, adapters, and what each model family needs."""
