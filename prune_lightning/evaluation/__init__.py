"""Scoring a language model: edits, abilities, perplexity."""
