"""The network: building it from its parts, freezing parts of it, and its training loss.

Nothing is imported here: transformers takes seconds to import, and not every caller needs it.
"""
