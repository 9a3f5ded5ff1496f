"""What `make bench` runs: `python -m benchmarks.run [PART ...]`."""
