"""The two errors the core itself raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work, found when it was built.

    `field` names the setting (`"Breaker.failures"`, `"endpoints[2]"`).
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str]]:
        return type(self), (self.field, self.problem)


class IllegalEvent(RuntimeError):
    """An event that has no transition from the present state: a bug in the caller, never a fault of the network."""
