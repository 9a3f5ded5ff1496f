"""What maintainers run by hand, from a checkout: `python -m tools.NAME`."""
