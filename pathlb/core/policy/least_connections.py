"""Least connections: the candidate with the fewest requests in flight for its weight."""

from __future__ import annotations

from collections.abc import Sequence

from ..model import Rng
from .base import CandidateT


class LeastConnections:
    """Full scan for the least `in_flight / weight` (nginx `least_conn`), ties broken at random in proportion to weight.

    The random tie-break keeps many clients from starting in step on the same endpoint. An idle endpoint always is a
    candidate, however small its weight: one on the slow-start ramp gets requests one at a time at least, never none.
    """

    name = "least connections"

    def pick(self, candidates: Sequence[CandidateT], rng: Rng, /) -> CandidateT:
        best = candidates[0]
        least = best.in_flight / best.weight
        tied = best.weight
        for candidate in candidates[1:]:
            load = candidate.in_flight / candidate.weight
            if load < least:
                best, least, tied = candidate, load, candidate.weight
            elif load == least:
                # Weighted reservoir sampling: each of those tied ends up chosen with its share of their weight.
                tied += candidate.weight
                if rng.random() * tied < candidate.weight:
                    best = candidate
        return best
