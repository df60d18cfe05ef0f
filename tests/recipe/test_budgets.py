"""Budgets and stop rules against sums done by hand."""

import itertools

import pytest

from eaft_verl.recipe.budgets import evaluation_points, matches, nll_window, smoothed_nll, spent, steps_for
from eaft_verl.training.schedule import DeviceSeconds, FixedSteps, Moment, UntilNll


def test_what_a_run_has_spent_in_four_units() -> None:
    rows = [{"step": 1, "tokens": 90, "samples": 4, "generated_tokens": 200}]
    rows.append({"step": 2, "tokens": 180, "samples": 8, "generated_tokens": 410})
    found = spent({"train_seconds": 30.0, "workers": 4}, rows)
    assert found == {"updates": 2, "tokens": 590, "samples": 8, "device_seconds": 120.0}
    sft = spent({"train_seconds": 30.0, "workers": 1}, [{"step": 5, "tokens": 70, "samples": 20}])
    assert sft == {"updates": 5, "tokens": 70, "samples": 20, "device_seconds": 30.0}
    assert spent({"total_steps": 5}, [])["updates"] == 5
    assert spent({}, []) == dict.fromkeys(("updates", "tokens", "samples", "device_seconds"))


@pytest.mark.parametrize(
    ("amount", "costs", "expected"),
    [
        (30, [10, 10, 10, 10], 3),  # exactly
        (34, [10, 10, 10, 10], 3),  # 30 is nearer than 40
        (36, [10, 10, 10, 10], 4),
        (35, [10, 10, 10, 10], 3),  # equally near: the smaller
        (21, [7, 9, 3, 8], 3),  # 7, 16, 19, 27: 19 is nearer than 27
        (24, [7, 9, 3, 8], 4),
        (1, [10, 10], 1),  # never fewer than one
        (14, [10, 10], 1),
        (16, [10, 10], 2),
    ],
)
def test_the_number_of_steps_nearest_to_a_budget(amount: float, costs: list[float], expected: int) -> None:
    assert steps_for(amount, costs) == expected
    assert steps_for(amount, itertools.chain(costs, itertools.repeat(5))) == expected


def test_costs_that_end_too_early_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="end at 20.0, before 30"):
        steps_for(30, [10, 10])


@pytest.mark.parametrize(
    ("unit", "mine", "other", "updates", "expected"),
    [
        ("tokens", 1050, 1000, 1000, True),  # 5 % is allowed
        ("tokens", 1052, 1000, 1000, False),
        ("tokens", 948, 1000, 1000, False),
        ("tokens", 945, 1000, 8, True),  # off by 55, and half a mean step is 59: no number of steps comes closer
        ("tokens", 900, 1000, 8, False),  # off by 100 of 56
        ("device_seconds", 1120, 1000, 8, True),  # ends with the step in which the budget is used up
        ("device_seconds", 1150, 1000, 8, False),  # off by 150 of 144
        ("updates", 9, 10, 9, False),  # updates can always be met
        ("updates", 105, 100, 105, True),
        ("samples", None, 10, 9, None),
        ("samples", 10, None, 9, None),
    ],
)
def test_budgets_are_equal_within_a_tolerance(unit, mine, other, updates, expected) -> None:
    own = {"updates": updates, "tokens": None, "samples": None, "device_seconds": None, unit: mine}
    assert matches(unit, own, {**own, unit: other}) is expected


ROWS = [
    {"step": 1, "nll": 4.0, "step_tokens": 10},
    {"step": 2, "nll": 3.0, "step_tokens": 30},
    {"step": 3, "nll": 1.0, "step_tokens": 60},
]


def test_means_over_training_are_means_over_tokens() -> None:
    assert smoothed_nll(ROWS, 2) == pytest.approx((90 + 60) / 90)
    assert smoothed_nll(ROWS, 3) == pytest.approx((40 + 90 + 60) / 100)
    assert [nll_window(steps) for steps in (1, 14, 15, 30, 640)] == [1, 1, 2, 3, 64]


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (5, [1, 2, 5]),  # 4 is too near to the end
        (6, [1, 2, 4, 6]),
        (16, [1, 2, 4, 8, 16]),
        (17, [1, 2, 4, 8, 17]),
        (24, [1, 2, 4, 8, 16, 24]),
        (2970, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2970]),
    ],
)
def test_evaluation_points(total: int, expected: list[int]) -> None:
    assert evaluation_points(total) == expected
    plan = FixedSteps(total)
    moments = [plan.after({"step": step}) for step in range(1, total + 1)]
    assert [step for step, moment in enumerate(moments, 1) if moment.evaluate] == expected
    assert [moment.last for moment in moments] == [False] * (total - 1) + [True]


def test_evaluations_are_spaced_by_ratios_up_to_the_end() -> None:
    for total in range(1, 300):
        found = evaluation_points(total)
        assert found[0] == 1 and found[-1] == total
        assert all(1.5 <= later / earlier <= 3 for earlier, later in itertools.pairwise(found))


def timed(plan: DeviceSeconds, durations: list[float]) -> list[Moment]:
    seconds = itertools.accumulate(durations)
    rows = enumerate(zip(seconds, durations, strict=True), 1)
    return [plan.after({"step": step, "seconds": at, "step_s": took}) for step, (at, took) in rows]


def test_training_ends_when_the_device_seconds_are_used_up() -> None:
    # 2 devices, 40 device seconds: 20 seconds; steps of 3 end at 3, 6, ..., and 21 is nearer to 20 than 18
    moments = timed(DeviceSeconds(40.0, 2, expected=9), [3.0] * 7)
    assert [moment.last for moment in moments] == [False] * 6 + [True]
    # 7 steps are foretold, of which 4 are less than two thirds
    assert [step for step, moment in enumerate(moments, 1) if moment.evaluate] == [1, 2, 4, 7]


def test_a_long_step_ends_it_and_one_step_is_enough() -> None:
    moments = timed(DeviceSeconds(10.0, 1, expected=9), [1.0, 7.0])
    assert moments == [Moment(True, False), Moment(True, True)]  # 8 + 3.5 is past 10
    assert timed(DeviceSeconds(5.0, 1, expected=9), [60.0]) == [Moment(True, True)]


def test_a_restart_that_reads_its_rows_again_goes_on_as_before() -> None:
    durations = [2.0, 3.0, 2.5, 2.0, 3.0, 2.0, 2.0, 3.5]
    whole = timed(DeviceSeconds(20.0, 1, expected=9), durations)
    again = DeviceSeconds(20.0, 1, expected=9)
    timed(again, durations[:4])
    at = sum(durations[:4])
    rest = []
    for step, took in enumerate(durations[4:], 5):
        at += took
        rest.append(again.after({"step": step, "seconds": at, "step_s": took}))
    assert rest == whole[4:]


def test_the_expected_length_follows_the_pace() -> None:
    plan = DeviceSeconds(100.0, 1, expected=9)
    timed(plan, [4.0])
    assert plan.expected == 25
    plan = DeviceSeconds(5.0, 1, expected=9)
    timed(plan, [4.0])
    assert plan.expected == 1  # 4 + 2 is past 5, so it was the last


def test_training_ends_with_the_first_step_at_the_level() -> None:
    nlls = [5.0, 1.0, 4.0, 2.0, 2.5, 1.0]  # means of two: -, 3, 2.5, 3, 2.25, 1.75
    plan = UntilNll(9, level=2.25, window=2)
    moments = [plan.after({"step": step, "nll": nll, "step_tokens": 7}) for step, nll in enumerate(nlls[:5], 1)]
    assert [moment.last for moment in moments] == [False, False, False, False, True]
    assert [moment.evaluate for moment in moments] == [True, True, False, True, True]  # 1, 2, 4, 9; and the end
    assert plan.outcome() == {"nll_reached": True} and plan.expected == 5


def test_a_lucky_first_step_is_no_mean() -> None:
    plan = UntilNll(9, level=2.0, window=3)
    assert not plan.after({"step": 1, "nll": 0.1, "step_tokens": 7}).last


def test_a_level_that_is_never_reached_ends_with_the_plan() -> None:
    plan = UntilNll(3, level=0.5, window=1)
    moments = [
        plan.after({"step": step, "nll": nll, "step_tokens": 7}) for step, nll in ((1, 3.0), (2, "nan"), (3, 1.0))
    ]
    assert moments == [Moment(True, False), Moment(True, False), Moment(True, True)]
    assert plan.outcome() == {"nll_reached": False}
