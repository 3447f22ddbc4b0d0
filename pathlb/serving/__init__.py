"""`pathlb serve`: the gateway as a service of its own, in front of instances as nginx or Traefik would be.

One supervisor (`supervisor`) holds the listening socket and the signals, reads the configuration (`config`, `load`) and
answers the operator (`admin`); any number of workers (`worker`) accept from that socket, each with a balancer, an
`asgi.Gateway` and an HTTP server (`server`) of its own. They talk in lines of JSON (`channel`).
"""
