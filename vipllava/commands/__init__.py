"""What the console script runs: each command wires rooms together and decides nothing else."""
