"""The network: building it from its parts, freezing parts of it, and its training loss."""
