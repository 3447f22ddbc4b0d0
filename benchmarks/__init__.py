"""What pathlb costs and withstands, measured: `python -m benchmarks.overhead`, `throughput`, `in_flight`, `faults`."""
