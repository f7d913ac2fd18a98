"""The plan of a run: what fraction is done at each step, by steps and by a clock."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib.params import ParamsError
from lib.training.budget import CAREFUL_STEPS, REVISIONS, Budget, Plan
from tests.training.tiny import make_params


def test_a_plan_that_never_changes_is_linear() -> None:
    plan = Plan([(0, 7)])
    assert [plan.fraction(step) for step in range(7)] == [step / 7 for step in range(7)]


def test_a_changed_plan_goes_on_from_where_it_was() -> None:
    plan = Plan([(0, 10), (4, 6), (5, 25)])
    # 0.4 is done at step 4; then the other 0.6 in 2 steps; of the 0.3 that is left at step 5, each of 20 steps does a part
    assert [plan.fraction(step) for step in (0, 2, 4, 5, 6, 15, 24)] == pytest.approx([0, 0.2, 0.4, 0.7, 0.715, 0.85, 0.985])


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 300)), max_size=6), st.integers(1, 400))
def test_fractions_rise_from_0_to_1_whatever_changes(changes: list[tuple[int, int]], first: int) -> None:
    plan, step = Plan([(0, first)]), 0
    for more, left in changes:
        step += more
        if step >= plan.num_steps:
            break
        plan.revise(step, step + left)
    fractions = [plan.fraction(step) for step in range(plan.num_steps)]
    assert fractions[0] == 0
    assert fractions == sorted(set(fractions))
    assert fractions[-1] < 1
    assert [Plan(plan.revisions).fraction(step) for step in range(plan.num_steps)] == fractions


def run_with_clock(budget: Budget, seconds_of: list[float], seconds_per_step: float) -> float:
    """Steps that take the given times until the budget is finished; returns how long that was."""
    budget.start(seconds_per_step)
    seconds, steps = 0.0, 0
    while not budget.is_finished(steps):
        seconds += seconds_of[steps % len(seconds_of)]
        steps += 1
        if steps % 10 == 0 or budget.is_near_the_end(steps) or budget.is_finished(steps):
            budget.revise(steps, seconds)
    return seconds


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=200), st.floats(0.05, 20.0))
@example(seconds_of=[0.5, 0.9375, 1.90625, 0.5, 2.0, 1.90625], guess=1.0)  # a fast step just after a revision
def test_a_budget_in_seconds_is_kept_to_a_step_whatever_the_first_guess(seconds_of: list[float], guess: float) -> None:
    budget = Budget(make_params(budget_steps=None, budget_seconds=520.0, reserve_seconds=15.0, reserve_distill_seconds=5.0))
    seconds = run_with_clock(budget, seconds_of, guess)
    assert 500 - 2 * 2.0 <= seconds <= 500 + 2.0


def test_even_steps_fill_the_budget_exactly() -> None:
    budget = Budget(make_params(budget_steps=None, budget_seconds=100.0))
    assert run_with_clock(budget, [0.25], 0.3) == 100.0
    assert budget.plan.num_steps == 400


def test_steps_that_become_slower_are_noticed() -> None:
    """As with late quantization-aware training: the end of the schedule comes at the end of the time all the same."""
    budget = Budget(make_params(budget_steps=None, budget_seconds=300.0))
    seconds = run_with_clock(budget, [0.1] * 1000 + [0.3] * 10000, 0.1)
    assert 299 < seconds <= 300
    assert budget.plan.fraction(budget.plan.num_steps - 1) > 0.99


def test_the_last_steps_are_watched_one_by_one() -> None:
    budget = Budget(make_params(budget_steps=None, budget_seconds=100.0))
    seconds = run_with_clock(budget, [0.125] * 796 + [0.5] * 100, 0.125)  # slower just after the last regular revision
    assert 99 < seconds <= 100


def test_a_long_run_has_few_revisions() -> None:
    budget = Budget(make_params(budget_steps=None, budget_seconds=600.0))
    generator = np.random.default_rng(0)
    run_with_clock(budget, generator.uniform(0.09, 0.11, 7000).tolist(), 0.1)
    assert 5 < len(budget.plan.revisions) <= len(REVISIONS) + CAREFUL_STEPS


def test_a_run_by_seconds_is_repeated_by_steps() -> None:
    budget = Budget(make_params(budget_steps=None, budget_seconds=100.0))
    run_with_clock(budget, [0.25, 0.4, 0.1], 1.0)
    again = Budget(make_params(budget_steps=[list(pair) for pair in budget.plan.revisions]))
    again.revise(5, 1e6)  # the clock has no say
    num_steps = budget.plan.num_steps
    assert again.is_finished(num_steps) and not again.is_finished(num_steps - 1)
    assert [again.plan.fraction(step) for step in range(num_steps)] == [budget.plan.fraction(step) for step in range(num_steps)]


def test_state_is_kept() -> None:
    params = make_params(budget_steps=None, budget_seconds=100.0)
    budget = Budget(params)
    budget.start(1.0)
    budget.revise(10, 5.0)
    other = Budget(params)
    other.load_state_dict(budget.state_dict())
    for one in (budget, other):
        one.revise(40, 20.0)
    assert other.plan.revisions == budget.plan.revisions != [(0, 100)]


@pytest.mark.parametrize(("changes", "message"), [
    ({"budget_steps": None}, "a value for exactly one"),
    ({"budget_seconds": 3.0}, "a value for exactly one"),
    ({"budget_steps": []}, "budget_steps"),
    ({"budget_steps": [[1, 5]]}, "pairs of a step, rising from 0"),
    ({"budget_steps": [[0, 5], [0, 6]]}, "pairs of a step, rising from 0"),
    ({"budget_steps": [[0, 5], [7, 6]]}, "pairs of a step, rising from 0"),
    ({"reserve_seconds": 3.0}, "expected null, or together a number below budget_seconds None, found 3.0 and None"),
    ({"budget_steps": None, "budget_seconds": 3.0, "reserve_seconds": 3.0}, "together a number below budget_seconds 3.0"),
    ({"budget_steps": None, "budget_seconds": 3.0, "reserve_seconds": 1.0, "reserve_distill_seconds": 2.0}, "3.0, found 1.0 and 2.0"),
])
def test_impossible_budgets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        make_params(**changes)
