"""The embedded sample world: scenes, records, shards, a sample ViP-Bench and base weights.

Real photographs and real handwritten digits (carried by scikit-image and scikit-learn) and drawn
objects make scenes whose boxes and masks are exact, small enough that a tiny model learns to read
visual prompts on a CPU in minutes.
"""
