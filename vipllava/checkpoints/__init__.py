"""Checkpoint formats: folders that hold a model, its tokenizer and what was done to it."""
