"""Pages and pictures from plain values; knows nothing of how they were measured."""
