"""Least connections: the candidate with the fewest requests in flight for its weight."""

from __future__ import annotations

from collections.abc import Sequence

from ..model import Rng
from .base import CandidateT


class LeastConnections:
    """Full scan for the least `(in_flight + 1) / weight`, ties broken at random (nginx and HAProxy `leastconn`).

    The + 1 is the request being placed: an idle endpoint of weight 1 then loses to an idle one of weight 2. The random
    tie-break keeps many clients from starting in step on the same endpoint.
    """

    name = "least connections"

    def pick(self, candidates: Sequence[CandidateT], rng: Rng, /) -> CandidateT:
        best = candidates[0]
        least = (best.in_flight + 1) / best.weight
        ties = 1
        for candidate in candidates[1:]:
            load = (candidate.in_flight + 1) / candidate.weight
            if load < least:
                best, least, ties = candidate, load, 1
            elif load == least:
                # Reservoir sampling: the k-th of equals replaces the choice with probability 1/k.
                ties += 1
                if rng.random() * ties < 1.0:
                    best = candidate
        return best
