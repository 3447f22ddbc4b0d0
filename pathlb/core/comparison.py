"""Whether what stands out is an endpoint, or one service on it: like is compared with like.

A service that fails on one gateway must not take that gateway's other services away, and a mix of slow and fast
services must not make a gateway look slow. So where the traffic has several keys, endpoints are compared key by key,
and as a whole by what is usual for each key. An endpoint is set aside as a whole when it stands out by most of
its traffic, or when nothing speaks against that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from .config import Outlier
from .endpoints import EndpointState
from .outlier import UNKNOWN, Comparison, Norm, Verdict, gather, judge, norm_of, surest_first

_TO_SPEAK = 5  # good outcomes of other keys in the window that speak for an endpoint
_SPARED = 0.25  # of an endpoint's traffic: if so much goes well, it is not the endpoint
_COINCIDENCE = 0.2  # how likely it may be that just those requests hang which were sent last
_AT_A_TIME = 30  # scopes compared key by key in one go: the other keys have their turn the next times

Finding = tuple[EndpointState, str | None, Verdict]
"""An endpoint, the key that stands out there (None: all of it), and what was found."""


class Judge:
    """Compares endpoints again and again. It knows what is usual for each key, and which keys' turn it is."""

    def __init__(self, config: Outlier) -> None:
        self.config = config
        self._inclined = replace(
            config, confirm=0.0, failure_sigma=config.failure_sigma / 2, latency_sigma=config.latency_sigma / 2
        )
        """To ask whether something agrees with what is established already."""
        self._norms: dict[str, Norm] = {}
        """Of each key there is evidence about, the one compared longest ago first."""
        self.compared = 0
        """How many scopes the last comparison was of: what it costs is in proportion."""

    def compare(self, states: Sequence[EndpointState], now: float) -> list[Finding]:
        """What stands out among `states`, those in service, the surest first. `now` is running time."""
        self.compared = len(states)
        keys = active_keys(states, now - self.config.window)
        if len(keys) < 2:
            whole = {verdict.scope: verdict for verdict in judge(states, now, self.config)}
            findings: list[Finding] = [(state, None, whole[state]) for state in states if state in whole]
        else:
            findings = self._compare_by_key(states, keys, now)
        return sorted(findings, key=lambda finding: surest_first(finding[2]))

    def _compare_by_key(self, states: Sequence[EndpointState], keys: Collection[str], now: float) -> list[Finding]:
        accused = self._accused(states, keys, now)
        comparison = self._as_a_whole(states, now, self.config)
        whole = {verdict.scope: verdict for verdict in comparison.verdicts()}
        findings: list[Finding] = []
        for state in states:
            own, verdict = accused.get(state, {}), whole.get(state)
            if verdict is not None and not self._is_about_most(states, now, comparison, verdict, own):
                verdict = None
            if verdict is None and own and not _is_due_to(own, state, now - self.config.window):
                verdict = whole.get(state) or next(iter(own.values()))
            findings += [(state, None, verdict)] if verdict else [(state, key, one) for key, one in own.items()]
        return findings

    def _accused(
        self, states: Sequence[EndpointState], keys: Collection[str], now: float
    ) -> dict[EndpointState, dict[str, Verdict]]:
        """What stands out by single keys, of those whose turn it is."""
        norms = {key: UNKNOWN for key in keys if key not in self._norms}
        norms.update((key, norm) for key, norm in self._norms.items() if key in keys)
        accused: dict[EndpointState, dict[str, Verdict]] = {}
        for key in list(norms)[: max(1, _AT_A_TIME // max(1, len(states)))]:
            scopes = {scope: state for state in states if (scope := state.scopes.get(key)) is not None}
            evidence = [gather(scope, now, self.config) for scope in scopes if scope.in_service]
            comparison = Comparison(evidence, now, self.config, chances=len(keys))
            for verdict in comparison.verdicts():
                accused.setdefault(scopes[verdict.scope], {})[key] = verdict
            self.compared += len(evidence)
            del norms[key]
            norms[key] = comparison.rest
            if not comparison.rest.known:  # rare: by all that is remembered
                norms[key] = norm_of(sample for scope in scopes for sample in scope.recent.since(-math.inf))
        self._norms = norms
        return accused

    def _as_a_whole(
        self, states: Sequence[EndpointState], now: float, config: Outlier, without: Collection[str | None] = ()
    ) -> Comparison:
        norms: dict[str | None, Norm] = {key: norm for key, norm in self._norms.items() if norm.known}
        return Comparison([gather(state, now, config, without) for state in states], now, config, norms)

    def _is_about_most(
        self,
        states: Sequence[EndpointState],
        now: float,
        comparison: Comparison,
        verdict: Verdict,
        own: Collection[str],
    ) -> bool:
        """Whether the endpoint stands out for more than the keys accused, or than any one: for most of its traffic."""
        scope = verdict.scope
        if verdict.signal == "stall":
            hanging = comparison.hanging(scope)
            keys = set(hanging)
            if None in keys or len(keys) < 2:
                return None in keys  # requests without a key ask for nothing but the endpoint itself
            share = comparison.share(scope, keys)
            return share > 0.5 or share ** len(hanging) < _COINCIDENCE
        worst, spared = comparison.blame(verdict)
        if worst is None or spared > _SPARED:
            return worst is None
        rest = self._as_a_whole(states, now, self._inclined, own or {worst})
        return any(other.scope is scope for other in rest.verdicts())


def active_keys(states: Sequence[EndpointState], since: float) -> dict[str, None]:
    """Keys there is evidence about, from `since` on."""
    return dict.fromkeys(
        key
        for state in states
        for key, scope in state.scopes.items()
        if scope.waiting or scope.recent.last_added >= since
    )


def _is_due_to(accused: Collection[str], state: EndpointState, since: float) -> bool:
    """Whether it is the services accused and not the endpoint: it does well for others, or without a key; or it was
    such a service before, as one that hangs keeps the others from being sent there.
    """
    good = sum(sample.key is None and not sample.failed for sample in state.recent.since(since))
    for key, scope in state.scopes.items():
        if key not in accused and scope.in_service:
            good += sum(not sample.failed for sample in scope.recent.since(since))
    return good >= _TO_SPEAK or any(state.scopes[key].ejection.recent for key in accused)
