"""Round-robin in proportion to weight, interleaved as evenly as the weights allow."""

from __future__ import annotations

from collections.abc import Sequence

from ..model import Rng
from .base import CandidateT


class RoundRobin:
    """Smooth weighted round-robin (nginx): each pick raises every candidate's credit by its weight, takes the one with
    the most, and charges it the sum. Weights 5, 1, 1 give a a b a c a a, not a a a a a b c.
    """

    name = "round robin"

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}

    def pick(self, candidates: Sequence[CandidateT], rng: Rng, /) -> CandidateT:
        # Only those present keep their credit: one that was out starts even, it is owed nothing.
        known = self._credit
        credit = {candidate.endpoint.url: known.get(candidate.endpoint.url, 0.0) for candidate in candidates}
        total = 0.0
        best, most = candidates[0], float("-inf")
        for candidate in candidates:
            url = candidate.endpoint.url
            credit[url] += candidate.weight
            total += candidate.weight
            if credit[url] > most:
                best, most = candidate, credit[url]
        credit[best.endpoint.url] -= total
        self._credit = credit
        return best
