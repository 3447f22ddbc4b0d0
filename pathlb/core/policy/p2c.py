"""Power of two choices: two different candidates at random, the less loaded of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..model import Rng
from .base import CandidateT


class P2C:
    """Compares `in_flight / weight` of two distinct random candidates (Mitzenmacher 2001; Finagle, linkerd); a tie goes
    to either in proportion to weight. Costs the same for five endpoints and for a thousand.
    """

    name = "p2c"

    def pick(self, candidates: Sequence[CandidateT], rng: Rng, /) -> CandidateT:
        count = len(candidates)
        first = rng.randrange(count)
        second = rng.randrange(count - 1)
        if second >= first:  # shift past the first, so that the two are never the same
            second += 1
        one, other = candidates[first], candidates[second]
        one_load, other_load = one.in_flight / one.weight, other.in_flight / other.weight
        if one_load == other_load:
            return other if rng.random() * (one.weight + other.weight) < other.weight else one
        return other if other_load < one_load else one
