"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from ..load import LatencyEstimate
from ..model import Endpoint, Rng


class Candidate(Protocol):
    """An eligible endpoint, as a policy sees it. Read only."""

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def in_flight(self) -> int:
        """Requests picked and not yet released, connecting ones included."""

    @property
    def weight(self) -> float:
        """Present weight, above 0: the configured one, smaller during a slow start."""

    @property
    def latency(self) -> LatencyEstimate:
        """Its `seconds` is None until the first reply."""


CandidateT = TypeVar("CandidateT", bound=Candidate)


class Policy(Protocol):
    """Chooses one of the candidates. It may keep state between picks, and belongs to one balancer then.

    Draw random numbers from `rng` only: the same seed then gives the same picks, also in a simulation.
    """

    @property
    def name(self) -> str:
        """Short; given as the reason of a pick."""

    def pick(self, candidates: Sequence[CandidateT], rng: Rng, /) -> CandidateT:
        """One of `candidates`, which has at least two members."""
