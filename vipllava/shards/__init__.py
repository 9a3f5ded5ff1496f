"""Data sets on disk: manifests, tars with their indices, and tars at an address."""
