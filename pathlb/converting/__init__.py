"""`pathlb convert`: the configuration of another load balancer as one of `pathlb serve`, and what is lost on the way.

One module a source (`nginx`, `traefik`), each with a function that reads a file and answers a `Draft`; `draft` makes
TOML of it.
"""
