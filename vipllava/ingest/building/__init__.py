"""Annotation lists and images into tars."""
