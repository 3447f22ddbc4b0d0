"""The decisions of the balancer, without I/O: clock readings and random numbers are passed in."""
