"""Annotation lists and pictures into tars."""
