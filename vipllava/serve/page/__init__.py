"""The page: a person draws on a picture, asks, and compares what models answer."""
