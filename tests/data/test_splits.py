"""Rules resolve to the times they promise; the first time is never held out."""

import pytest

from scjax.config import from_dict, to_dict
from scjax.data.splits import (
    HoldOutInterior,
    HoldOutLast,
    HoldOutNone,
    HoldOutTimes,
    ReferenceSplit,
    TimeSplit,
    each_interior,
    load_split,
    save_split,
    split_times,
)

DAYS = (0.0, 2.0, 4.0, 7.0)
RULES = [
    (HoldOutNone(), ()),
    (HoldOutTimes(times=(4.0,)), (4.0,)),
    (HoldOutInterior(), (2.0, 4.0)),
    (HoldOutLast(n_times=2), (4.0, 7.0)),
]


@pytest.mark.parametrize(("rule", "held_out"), RULES)
def test_rules(rule, held_out):
    split = split_times(rule, DAYS)
    assert split.held_out == held_out
    assert split.train == tuple(t for t in DAYS if t not in held_out)
    assert split.times == DAYS
    assert split.rule == rule


def test_interior_times_in_turn():
    assert each_interior(DAYS) == (HoldOutTimes(times=(2.0,)), HoldOutTimes(times=(4.0,)))


@pytest.mark.parametrize(
    ("dataset", "name", "n_times", "held_out"),
    [
        ("ZB", "three_interpolation", 12, (4, 6, 8)),
        ("ZB", "two_forecasting", 12, (10, 11)),
        ("ZB", "remove_recovery", 12, (2, 4, 6, 8, 10, 11)),
        ("ZB", "all_times", 12, ()),
        ("MEF", "three_interpolation", 19, (5, 10, 15)),
        ("MEF", "three_forecasting", 19, (16, 17, 18)),
        ("MEF", "remove_recovery", 19, (5, 7, 9, 11, 15, 16, 17, 18)),
        ("MEF", "all_times", 19, ()),
        ("Panc", "all_times", 8, ()),
        *[("Panc", f"leaveout{k}", 8, (k,)) for k in range(1, 8)],
    ],
)
def test_splits_of_the_reference(dataset, name, n_times, held_out):
    times = [3.3 + i**1.5 for i in range(n_times)]
    split = split_times(ReferenceSplit(dataset=dataset, name=name), times)
    assert [times.index(t) for t in split.held_out] == list(held_out)
    assert len(split.train) + len(held_out) == n_times


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split_times(HoldOutTimes(times=(0.0,)), DAYS), "first time, 0.0, cannot be held out: .* the start"),
        (lambda: split_times(HoldOutTimes(times=(3.0,)), DAYS), "3.0 is not a time of the data, which are 0.0, 2.0"),
        (lambda: split_times(HoldOutLast(n_times=4), DAYS), "first time"),
        (lambda: split_times(HoldOutLast(n_times=3), DAYS), "leaves 1 of 4 times"),
        (lambda: split_times(HoldOutInterior(), (0.0, 1.0)), "no interior time"),
        (lambda: each_interior((0.0, 1.0)), "no interior time"),
        (lambda: split_times(ReferenceSplit(dataset="Panc", name="leaveout1"), DAYS), "Panc has 8 times, .* have 4"),
        (lambda: split_times(HoldOutNone(), (0.0, 2.0, 2.0)), "repeated"),
        (lambda: ReferenceSplit(dataset="Panc", name="leaveout8"), "name must be one of .*leaveout7"),
        (lambda: HoldOutLast(n_times=0), "n_times must be at least 1"),
        (lambda: HoldOutTimes(times=()), "use HoldOutNone"),
    ],
)
def test_bad_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_time_stored_in_single_precision_is_recognised():
    assert split_times(HoldOutTimes(times=(0.1,)), (0.0, 0.10000000149011612, 1.0)).held_out == (0.10000000149011612,)


@pytest.mark.parametrize("rule", [r for r, _ in RULES])
def test_json_round_trip_and_no_overwriting(rule, tmp_path):
    split = split_times(rule, DAYS)
    assert from_dict(TimeSplit, to_dict(split)) == split
    save_split(tmp_path / "split.json", split)
    assert load_split(tmp_path / "split.json") == split
    with pytest.raises(FileExistsError):
        save_split(tmp_path / "split.json", split)
