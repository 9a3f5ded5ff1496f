"""The benchmarks, one file each: read, ask, score; `evaluation/run.py` wires them."""
