"""Picking policies, one file each. A policy is any object with a `name` and a `pick`."""

from __future__ import annotations

from .base import Candidate, Policy
from .least_connections import LeastConnections
from .p2c import P2C
from .round_robin import RoundRobin

__all__ = ["P2C", "Candidate", "LeastConnections", "Policy", "RoundRobin"]
