"""Faults of a data set, found before training meets them; nothing is written or changed."""
