"""Answering questions about marked pictures with a trained model."""
