"""The retry budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathlb.core.budget import RetryBudget, RetryBudgets
from pathlb.core.config import Retry


def budget(ratio: float = 0.2, reserve: float = 1.0, ttl: float = 10.0) -> RetryBudget:
    return RetryBudget(Retry(budget_ratio=ratio, budget_reserve=reserve, budget_ttl=ttl))


def test_the_reserve_alone() -> None:
    one = budget()
    assert one.balance(0.0) == 10.0
    assert [one.withdraw(0.0) for _ in range(11)] == [True] * 10 + [False]
    assert one.balance(0.0) == 0.0


def test_requests_earn_their_share() -> None:
    one = budget(reserve=0.0)
    assert not one.withdraw(0.0)
    for _ in range(5):
        one.deposit(0.0)
    assert one.balance(0.0) == pytest.approx(1.0)
    assert one.withdraw(0.0)
    assert not one.withdraw(0.0)


def test_both_sides_expire() -> None:
    one = budget(reserve=0.0)
    for _ in range(50):
        one.deposit(0.0)
    assert one.balance(5.0) == pytest.approx(10.0)
    assert one.balance(10.5) == 0.0
    other = budget()
    for _ in range(10):
        other.withdraw(0.0)
    assert other.balance(10.5) == 10.0


def test_withdrawals_that_outlive_their_deposits_make_no_debt() -> None:
    one = budget(reserve=0.0)
    for _ in range(50):
        one.deposit(0.0)
    for _ in range(10):
        assert one.withdraw(9.0)
    assert one.balance(11.0) == 0.0


def test_no_budget_at_all() -> None:
    one = budget(ratio=0.0, reserve=0.0)
    one.deposit(0.0)
    assert not one.withdraw(0.0)


@given(
    ratio=st.floats(0, 2),
    reserve=st.floats(0, 5),
    steps=st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=60),
)
def test_within_zero_and_cap(ratio: float, reserve: float, steps: list[tuple[float, bool]]) -> None:
    one = budget(ratio, reserve)
    now, deposits, granted = 0.0, 0, 0
    for gap, deposit in steps:
        now += gap
        if deposit:
            one.deposit(now)
            deposits += 1
        else:
            before = one.balance(now)
            paid = one.withdraw(now)
            assert paid == (before >= 1)
            granted += paid
        assert 0 <= one.balance(now) <= reserve * 10 + ratio * deposits + 1e-9
    periods = 1 + now / 9.0
    assert granted <= (reserve * 10) * (periods + 1) + ratio * deposits * 2 + 1


def test_a_service_spends_its_own_retries_only() -> None:
    budgets = RetryBudgets(Retry(budget_ratio=0.0, budget_reserve=1.0, budget_ttl=10.0))
    spent = budgets.of(0.0, "eth")
    while spent.withdraw(0.0):
        pass
    assert not budgets.of(0.0, "eth").withdraw(0.0)
    assert budgets.of(0.0, "solana").withdraw(0.0)
    assert budgets.of(0.0, None).withdraw(0.0)
    assert budgets.balance(0.0) == 9 + 9


def test_made_up_keys_share_one_budget() -> None:
    budgets = RetryBudgets(Retry(budget_ttl=10.0))
    first = [budgets.of(0.0, f"key-{number}") for number in range(RetryBudgets.KEPT)]
    assert len(set(map(id, first))) == RetryBudgets.KEPT
    assert budgets.of(1.0, "one more") is budgets.of(1.0, "another") is budgets.of(1.0, None)
    assert budgets.of(9.0, "key-7") is first[7]
    assert budgets.of(10.5, "later") is not budgets.of(10.5, None), "those not used for a while make room"
    assert budgets.of(10.5, "key-7") is first[7]
    assert budgets.of(10.5, "key-3") is not first[3]
