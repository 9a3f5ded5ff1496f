"""Scores of captions as published: CIDEr-D in NumPy, METEOR by its own program."""
