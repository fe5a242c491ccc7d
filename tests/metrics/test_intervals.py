"""Bootstrap intervals: their width and coverage where theory knows them, pairing, and when there is none."""

import json
import math

import numpy as np
import pytest

from scjax.metrics.intervals import LEAST_UNITS, Interval, interval, ratio_interval


def test_width_is_that_of_a_mean():
    """One seed: 1.96 standard errors to each side."""
    values = np.random.default_rng(0).normal(3, 2, size=(1, 200))
    found = interval(values, n_resamples=20_000)
    error = values.std() / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert (found.n_units, found.n_seeds, found.exists) == (200, 1, True)


def test_it_covers_the_truth_as_often_as_it_says():
    """40 units of a skewed distribution, 200 times: 88 to 98 % (a percentile interval is a little short)."""
    rng = np.random.default_rng(1)
    found = [interval(rng.exponential(size=(1, 40)), seed=i, n_resamples=400) for i in range(200)]
    assert 0.88 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.98


def test_seeds_that_differ_widen_it():
    """All units alike, seeds apart: the interval is that of the seeds."""
    seeds = np.array([1.0, 2.0, 3.0, 4.0])
    found = interval(np.repeat(seeds[:, None], 50, axis=1), n_resamples=20_000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * seeds.std() / 2, rel=0.1)
    assert interval(np.full((1, 50), 2.5)).low == pytest.approx(2.5)


def test_differences_are_paired():
    """Units far apart, a constant gain: the difference is certain though neither mean is."""
    hard = np.random.default_rng(2).normal(0, 100, size=(1, 20))
    found = interval(hard + 1 - hard)
    assert (found.low, found.high) == pytest.approx((1, 1))
    assert found.clear_of_zero
    assert not interval(hard + 1).clear_of_zero


def test_median_is_not_moved_by_one_unit():
    values = np.append(np.random.default_rng(3).normal(size=99), 1e6)[None]
    assert interval(values, statistic="median").high < 1
    assert interval(values).high > 1e3


def test_ratio_of_means_takes_both_from_the_same_units():
    """With equal scales it is the interval of the values; values in proportion to them have one ratio."""
    rng = np.random.default_rng(5)
    values, scales = rng.normal(size=(3, 12)), rng.exponential(size=12)
    plain = interval(values)
    assert ratio_interval(values, np.full(12, 2.0))[:2] == pytest.approx((plain.low / 2, plain.high / 2))
    assert ratio_interval(0.3 * scales[None], scales)[:2] == pytest.approx((0.3, 0.3))
    assert ratio_interval(values, -scales).note == "the scale is not clear of zero"
    assert ratio_interval(values[:, :3], scales[:3]).note == "3 units, fewer than 5"


def test_draws_follow_the_seed():
    values = np.random.default_rng(4).normal(size=(3, 10))
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)
    wide, narrow = interval(values, 0.99), interval(values, 0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_too_few_units_or_failed_values_have_none_and_say_so():
    few = interval(np.ones((3, LEAST_UNITS - 1)))
    assert (few.exists, few.note) == (False, f"{LEAST_UNITS - 1} units, fewer than {LEAST_UNITS}")
    assert str(few) == f"no interval ({few.note})"
    failed = interval(np.array([[1.0, 2, 3, 4, 5, math.nan]]))
    assert (failed.exists, failed.note) == (False, "1 values could not be computed")
    again = json.loads(json.dumps(failed.to_json_dict(), allow_nan=False))
    assert again == {"low": None, "high": None, "level": 0.95, "n_units": 6, "n_seeds": 1, "note": failed.note}
    assert not failed.clear_of_zero
    assert str(Interval(0.5, 0.75, 0.95, 9, 1)) == "[0.5, 0.75]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 1.0}, r"level must lie in \[0, 1\)"),
        ({"level": 0.0}, "level must be a positive"),
        ({"n_resamples": 10}, "n_resamples must be at least 100"),
        ({"statistic": "mode"}, "statistic must be one of 'mean', 'median'"),
        ({"values": np.ones((0, 9))}, "number of seeds of values must be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        interval(**{"values": np.ones((1, 9)), **change})
