"""Whether what stands out is an endpoint, or one service on it: like is compared with like.

A service that fails on one gateway must not take that gateway's other services away, and a mix of slow and fast
services must not make a gateway look slow. So where the traffic has several keys, endpoints are compared key by key,
and as a whole by what is usual for each key. An endpoint is set aside as a whole when it stands out by more than one
key, or when nothing on it speaks against that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Sequence

from .config import Outlier
from .endpoints import EndpointState
from .outlier import Comparison, Norm, Verdict, gather, judge, norm_of, surest_first
from .scope import Scope

_TO_SPEAK = 5  # good outcomes of other keys in the window that speak for an endpoint

Finding = tuple[EndpointState, str | None, Verdict]
"""An endpoint, the key that stands out there (None: all of it), and what was found."""


def compare(states: Sequence[EndpointState], now: float, config: Outlier) -> list[Finding]:
    """What stands out among `states`, those in service, the surest first. `now` is running time."""
    keys = active_keys(states, now - config.window)
    if len(keys) < 2:
        whole = {verdict.scope: verdict for verdict in judge(states, now, config)}
        findings: list[Finding] = [(state, None, whole[state]) for state in states if state in whole]
    else:
        findings = _compare_by_key(states, keys, now, config)
    return sorted(findings, key=lambda finding: surest_first(finding[2]))


def active_keys(states: Sequence[EndpointState], since: float) -> list[str]:
    """Keys there is evidence about, from `since` on."""
    return list(
        dict.fromkeys(
            key
            for state in states
            for key, scope in state.scopes.items()
            if scope.waiting or scope.recent.last_added >= since
        )
    )


def _compare_by_key(states: Sequence[EndpointState], keys: list[str], now: float, config: Outlier) -> list[Finding]:
    accused: dict[Scope, Verdict] = {}
    norms: dict[str | None, Norm] = {}
    for key in keys:
        scopes = [scope for state in states if (scope := state.scopes.get(key)) is not None]
        evidence = [gather(scope, now, config) for scope in scopes if scope.in_service]
        comparison = Comparison(evidence, now, config, chances=len(keys))
        accused.update((verdict.scope, verdict) for verdict in comparison.verdicts())
        norm = comparison.rest
        if not norm.known:  # rare: by all that is remembered
            norm = norm_of(sample for scope in scopes for sample in scope.recent.since(-math.inf))
        if norm.known:
            norms[key] = norm

    def everything(without: Collection[str | None] = ()) -> Comparison:
        return Comparison([gather(state, now, config, without) for state in states], now, config, norms)

    comparison = everything()
    whole = {verdict.scope: verdict for verdict in comparison.verdicts()}
    findings: list[Finding] = []
    for state in states:
        own = {key: accused[scope] for key, scope in state.scopes.items() if scope in accused}
        verdict = whole.get(state)
        if verdict is not None and not _is_about_all(verdict, comparison.behind(verdict), own, everything):
            verdict = None
        if verdict is None and own and not _spoken_for(state, own, now - config.window):
            verdict = next(iter(own.values()))
        findings += [(state, None, verdict)] if verdict else [(state, key, one) for key, one in own.items()]
    return findings


def _is_about_all(
    verdict: Verdict,
    behind: Collection[str | None],
    own: Collection[str],
    everything: Callable[[Collection[str | None]], Comparison],
) -> bool:
    """Whether the endpoint stands out by more than the keys accused, or than any single one."""
    if None in behind:  # requests without a key ask for nothing but the endpoint itself
        return True
    if verdict.signal == "stall":
        return len(behind) > 1
    without = everything(own or behind).verdicts(at_once=True)
    return any(other.scope is verdict.scope for other in without)


def _spoken_for(state: EndpointState, accused: Container[str], since: float) -> bool:
    """Whether it does well for other keys than those accused, or without one."""
    good = [sample for sample in state.recent.since(since) if sample.key is None and not sample.failed]
    for key, scope in state.scopes.items():
        if key not in accused and scope.in_service:
            good += [sample for sample in scope.recent.since(since) if not sample.failed]
    return len(good) >= _TO_SPEAK
