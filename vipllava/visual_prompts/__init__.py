"""Marks on pictures: palette, shapes, sampling of a plan, drawing it, naming it. No torch."""
