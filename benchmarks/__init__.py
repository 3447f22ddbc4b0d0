"""What pathlb costs and withstands, measured: `python -m benchmarks.overhead`, `python -m benchmarks.faults`."""
