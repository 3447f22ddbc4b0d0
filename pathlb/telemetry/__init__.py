"""Listens to the balancer; decides nothing. The trace headers are the only thing it adds to a request."""
