"""Tables: what they say when the model wins, loses or fails, and that nothing is hidden."""

import json
import math

import numpy as np
import pytest

from scjax.metrics.baselines import Baseline
from scjax.metrics.intervals import Interval
from scjax.metrics.population import (
    ALL_POPULATION_METRICS,
    POPULATION_METRICS,
    Comparison,
    Metric,
    Score,
    wasserstein_metric,
)
from scjax.metrics.report import (
    ResultTable,
    Row,
    aggregate,
    aggregate_to_json_dict,
    judge,
    normalised_score,
    outcome,
    render,
    render_aggregates,
    result_table,
    to_json_dict,
    verdict,
)

W1 = POPULATION_METRICS["W1"]
R2 = Metric("R2", "share of explained variance", "1", "higher is better", lambda pred, real: 0.0)


def comparison(*values, name="W1", n_nonfinite=0):
    return Comparison({name: Score(values)}, 10, len(values), 0, "", n_nonfinite)


def table(*model_values, metric=W1, baselines=(2.0, 3.0), floor=1.0):
    rows = [Row("model", "model", tuple(comparison(*v, name=metric.name) for v in model_values))]
    rows += [Row(f"b{i}", "baseline", (comparison(b, name=metric.name),)) for i, b in enumerate(baselines)]
    rows += [
        Row("undefined", "baseline", (), "not defined: no later time"),
        Row("floor", "floor", (comparison(floor, name=metric.name),)),
    ]
    return ResultTable("t", (metric,), tuple(rows), 10, 1, 0)


@pytest.mark.parametrize(
    ("model", "says", "does_not_say"),
    [
        ([(1.5, 1.5)], "BEATS the best training-free baseline, b0: 1.500 against 2.000, ratio 0.750.", "TIES"),
        ([(2.5, 2.5)], "LOSES TO the best training-free baseline, b0: 2.500 against 2.000, ratio 1.250.", "than"),
        ([(2.0, 2.0)], "model TIES WITH the best training-free baseline, b0: 2.000 against 2.000", "spread"),
        ([(1.99999, 1.99999)], "TIES WITH", "BEATS"),
        (
            [(1.4, 2.4)],
            "TIES WITH the best training-free baseline, b0: "
            "1.900 against 2.000, ratio 0.950; the difference is smaller than the spread over d",
            "seeds",
        ),
        ([(1.6, 2.8)], "TIES WITH", "LOSES"),
        ([(1.4,), (2.4,)], "TIES WITH", "BEATS"),
        ([(1.4,), (2.4,)], "smaller than the spread over seeds, 0.7071", "draws"),
        ([(1.5, math.nan)], "model FAILED (1 values could not be computed", "LOSES"),
    ],
)
def test_verdict_says_it_plainly(model, says, does_not_say):
    line = verdict(table(*model), "model", "W1")
    assert says in line
    assert does_not_say not in line


def test_verdict_follows_the_direction():
    assert "BEATS the best training-free baseline, b1" in verdict(table((3.5,), metric=R2), "model", "R2")
    assert "LOSES TO the best training-free baseline, b1" in verdict(table((2.5,), metric=R2), "model", "R2")


def test_verdict_against_chosen_rows():
    assert "LOSES TO" in verdict(table((2.5,)), "model", "W1")
    assert "BEATS the best training-free baseline, b1" in verdict(table((2.5,)), "model", "W1", ["b1"])
    assert "no training-free baseline is defined" in verdict(table((2.5,)), "model", "W1", ["undefined"])


@pytest.mark.parametrize(
    ("ours", "theirs", "settings", "found"),
    [
        (1.0, 2.0, {}, "win"),
        (2.0, 1.0, {}, "lose"),
        (-0.9, -0.8, {}, "win"),  # of a metric of which the higher is better, negated
        (1.0, 1.00004, {}, "tie"),  # both are told as 1.000
        (0.0, 0.0, {}, "tie"),
        (1.0, 1.2, {"spread": 0.21}, "tie"),
        (1.2, 1.0, {"spread": 0.21}, "tie"),
        (1.0, 1.2, {"spread": 0.19}, "win"),
        (1.0, 1.2, {"difference": Interval(-0.3, 0.1, 0.95, 5, 1)}, "tie"),
        (1.0, 1.2, {"difference": Interval(0.1, 0.3, 0.95, 5, 1)}, "win"),
        (1.0, 1.2, {"difference": Interval(math.nan, math.nan, 0.95, 4, 1, "4 units")}, "win"),
        (math.inf, 1.0, {"spread": math.nan}, "lose"),
    ],
)
def test_one_rule_says_win_tie_or_lose(ours, theirs, settings, found):
    assert outcome(ours, theirs, **settings) == found


def test_outcome_of_one_is_best_is_by_the_logarithm():
    """0.5 and 2 are equally far from 1; what is a spread of the ratios is none of their logarithms."""
    ratio = Metric("ratio", "a ratio", "1", "1 is best", lambda pred, real: 0.0)
    found = judge(table((0.5,), metric=ratio, baselines=(2.0, 3.0)), "model", "ratio")
    assert found.outcome == "tie"
    found = judge(table((0.1, 0.2), metric=ratio, baselines=(0.01, 0.02)), "model", "ratio")
    assert found.outcome == "win"
    found = judge(table((0.9, 1.1), metric=ratio, baselines=(1.08, 2.0)), "model", "ratio")
    assert found.outcome == "tie"
    assert "the difference of |log| is smaller than the spread over draws" in found.text
    assert judge(table((0.0,), (1.8,), metric=ratio), "model", "ratio").outcome == "win"


def test_outcome_and_line_say_the_same():
    for values, found, words in (
        ((1.5,), "win", "BEATS"),
        ((2.0,), "tie", "TIES WITH"),
        ((2.5,), "lose", "LOSES TO"),
        ((math.nan,), "failed", "FAILED"),
    ):
        said = judge(table(values), "model", "W1")
        assert said.outcome == found
        assert words in said.text
        assert said.text == verdict(table(values), "model", "W1")
    assert judge(table((2.5,)), "model", "W1", ["undefined"]).outcome is None


@pytest.mark.parametrize(("value", "score"), [(2.0, 0), (1.0, 1), (1.5, 0.5), (4.0, -2), (0.5, 1.5)])
def test_normalised_score_is_not_clipped(value, score):
    assert normalised_score(table((value,)), "model", "b0", "W1") == pytest.approx(score)


def test_spread_over_draws_and_seeds():
    row = Row("m", "model", (comparison(1.0, 3.0), comparison(5.0, 7.0)))
    assert row.mean("W1") == 4
    assert row.sd_draws("W1") == pytest.approx(math.sqrt(2))
    assert row.sd_seeds("W1") == pytest.approx(math.sqrt(8))
    assert Row("m", "model", (comparison(1.0, 3.0),)).sd_seeds("W1") is None


def test_text_is_aligned_with_the_floor_last():
    text = render(table((1.5, math.nan), baselines=(2.0, 123.456))).splitlines()
    rule = [i for i, line in enumerate(text) if set(line) == {"-"}]
    body = text[1 : rule[-1] + 1]
    assert len({len(line) for line in body}) == 1
    assert text[2].endswith("W1 ↓")
    assert text[rule[-1] - 1].startswith("floor")
    assert "123.5" in "\n".join(body)
    foot = "\n".join(text[rule[-1] :])
    assert W1.definition in foot
    assert "undefined: not defined: no later time." in foot
    assert "undefined" not in "\n".join(body), "a row of dashes says nothing"
    assert "Values that could not be computed: 1." in foot
    assert "failed (1)" in "\n".join(body)


def test_json_holds_everything_and_no_nan():
    plain = to_json_dict(table((1.5, math.nan), (1.0, 2.0)))
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again["metrics"]["W1"]["definition"] == W1.definition
    model, undefined = again["rows"][0], again["rows"][3]
    assert model["scores"]["W1"]["mean"] is None
    assert model["scores"]["W1"]["values"] == [[1.5, None], [1.0, 2.0]]
    assert model["scores"]["W1"]["n_failed"] == 1
    assert undefined["n_seeds"] == 0
    assert undefined["scores"]["W1"]["mean"] is None
    assert {"scjax", "jax", "numpy", "POT", "python", "platform"} <= set(again["environment"])


def test_all_rows_meet_the_same_cells_in_equal_numbers():
    """The smallest population sets the number; the model at the truth scores better than the baseline beside it."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 2))
    models = {"good": [rng.normal(size=(50, 2)) for _ in range(2)], "bad": [np.full((55, 2), np.nan)]}
    baselines = {"far": Baseline(rng.normal(size=(45, 2)) + 3, "shifted"), "none": Baseline(None, "not defined: why")}
    made = result_table("toy", models, baselines, real, {"W1": W1}, n_draws=3, seed=0, provenance={"split": "abc"})
    assert [row.kind for row in made.rows] == ["model", "model", "baseline", "baseline", "floor"]
    assert made.n_cells == 45
    assert {c.n_cells for row in made.rows[:4] for c in row.comparisons} == {45}
    assert made.rows[-1].comparisons[0].n_cells == 30
    assert {(c.n_cells, c.n_draws) for row in made.rows[:4] for c in row.matched} == {(30, 3)}
    assert [len(row.matched) for row in made.rows] == [2, 1, 1, 0, 0]
    assert "pessimistic" in made.rows[-1].note
    assert verdict(made, "good", "W1").startswith("W1: good BEATS the best training-free baseline, far")
    assert "55 predicted cells are not finite" in verdict(made, "bad", "W1")
    assert 0.9 < normalised_score(made, "good", "far", "W1") < 1.1
    assert to_json_dict(made)["provenance"] == {"split": "abc"}
    assert "55 predicted cells are not finite" in render(made)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: table((1.0,)).row("modell"), "no row is called 'modell'. Did you mean 'model'"),
        (lambda: table((1.0,)).metric("W2"), "no metric is called 'W2'"),
        (lambda: Row("m", "modle", ()), "Did you mean 'model'"),
        (lambda: ResultTable("t", (W1,), (Row("m", "model", ()),) * 2, 1, 1, 0), "'m' comes twice"),
        (
            lambda: result_table("t", {"m": []}, {}, np.ones((4, 1)), seed=0),
            "predictions of model 'm' must be at least",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_floor_and_rows_are_compared_at_equal_numbers():
    """A right model lies at the floor; with all its cells beside half of the real ones it seems to lie below."""
    rng = np.random.default_rng(1)
    real, far = rng.normal(size=(80, 4)), Baseline(rng.normal(size=(80, 4)) + 2, "")
    made = result_table(
        "t", {"true": [rng.normal(size=(80, 4)) for _ in range(4)]}, {"far": far}, real, {"W1": W1}, n_draws=8, seed=0
    )
    row, floor = made.row("true"), made.of_kind("floor")[0]
    assert row.comparisons[0].n_cells == 80
    assert row.at_floor().comparisons[0].n_cells == floor.comparisons[0].n_cells == 40
    assert row.mean("W1") < 0.95 * floor.mean("W1")
    assert row.at_floor().mean("W1") == pytest.approx(floor.mean("W1"), rel=0.05)
    assert normalised_score(made, "true", "far", "W1") == pytest.approx(1, abs=0.05)
    text = render(made)
    assert "The same with 40 cells of each population, as the floor has:" in text
    assert text.count("real vs real (floor)  ") == 2
    plain = to_json_dict(made)["rows"][0]["at_floor"]
    assert (plain["n_cells"], plain["n_draws"]) == (40, 8)
    assert plain["scores"]["W1"]["mean"] == row.at_floor().mean("W1")
    few = result_table("t", {"true": [real]}, {"far": far}, real, {"W1": W1}, n_cells=30, seed=0)
    assert few.row("true").matched == ()
    assert {c.n_cells for r in few.rows for c in r.comparisons} == {30}
    assert "The same with" not in render(few)


def test_values_that_are_not_by_the_definition_are_marked():
    rng = np.random.default_rng(2)
    metric = wasserstein_metric(1, max_exact=25)
    made = result_table("t", {"m": [rng.normal(size=(40, 2))]}, {}, rng.normal(size=(40, 2)), {"W1": metric}, seed=0)
    text = render(made)
    assert text.count("≈") == 2  # the model's cell, and what it means; the halves of the floor are small enough
    assert f"W1 of more than 25 cells is the {metric.beyond}" in text
    scores = [row["scores"]["W1"]["approximation"] for row in to_json_dict(made)["rows"]]
    assert scores == [metric.beyond, ""]


def test_one_is_best_in_a_table_of_populations():
    """A cloud too wide loses to one a little too narrow."""
    rng = np.random.default_rng(3)
    real = rng.normal(size=(60, 2))
    metric = {"variance_ratio": ALL_POPULATION_METRICS["variance_ratio"]}
    baselines = {"narrow": Baseline(0.9 * real, ""), "flat": Baseline(0.1 * real, "")}
    made = result_table("t", {"wide": [2 * real]}, baselines, real, metric, seed=0)
    told = verdict(made, "wide", "variance_ratio")
    assert "wide LOSES TO the best training-free baseline, narrow" in told
    assert "against 0.8100." in told, "a ratio of ratios says nothing"
    assert normalised_score(made, "wide", "flat", "variance_ratio") > 0
    assert normalised_score(made, "wide", "narrow", "variance_ratio") < 0
    assert "variance_ratio →1" in render(made)


def test_a_floor_above_the_baseline_spans_no_scale():
    assert math.isnan(normalised_score(table((1.5,), baselines=(0.9, 3.0)), "model", "b0", "W1"))


def times(*values, seeds=2, floor=1.0, best=2.0):
    """Tables of several held-out times: the model's value of each, the same for all seeds but for a hundredth."""
    made = []
    for i, value in enumerate(values):
        one = table(*[(value * (1 + 0.01 * s),) for s in range(seeds)], baselines=(best, best + i), floor=floor)
        made.append(ResultTable(f"time {i}", one.metrics, one.rows, 10, 1, 0))
    return made


def test_aggregate_is_of_ratios_to_the_best_baseline():
    values = np.array([1.0, 1.5, 1.8, 2.0, 2.5, 1.2])
    one = aggregate(times(*values))["model"]
    ratio = values[None] / 2 * np.array([[1.0], [1.01]])
    np.testing.assert_allclose(one.ratio, ratio)
    np.testing.assert_allclose(one.score, 2 - values[None] * np.array([[1.0], [1.01]]))
    assert one.best == ("b0",) * 6
    assert one.mean_ratio == pytest.approx(ratio.mean())
    assert one.share_at_most_one == pytest.approx(4 / 6)  # of the fourth time one seed is just above
    assert one.mean_score == pytest.approx(one.score.mean())
    found = one.ratio_interval()
    assert found.low < one.mean_ratio < found.high
    assert (found.n_units, found.n_seeds) == (6, 2)
    assert one.score_interval().low < one.mean_score < one.score_interval().high


def test_aggregate_in_words_and_as_json():
    made = {"6 times": aggregate(times(1.0, 1.5, 1.8, 2.0, 2.5, 1.2))["model"]}
    text = render_aggregates(made, "toy")
    assert text.startswith("toy\n")
    for word in ("4 of 6", "[", "b0", W1.definition, "time 5", "0.502 ± 0.004", "2000 resamples"):
        assert word in text
    plain = json.loads(json.dumps(aggregate_to_json_dict(made), allow_nan=False))["6 times"]
    assert plain["mean_ratio"] == pytest.approx(made["6 times"].mean_ratio)
    assert plain["ratio_interval"]["low"] < plain["mean_ratio"] < plain["ratio_interval"]["high"]
    few = aggregate(times(1.0, 1.5))
    assert few["model"].ratio_interval().note == "2 units, fewer than 5"
    assert "  -  " in render_aggregates(few)


def test_aggregate_hides_no_failure():
    """A failed time: no mean, no interval, and it is not among the times that are won."""
    one = aggregate(times(1.0, 1.5, 1.8, math.nan, 1.2, 1.3))["model"]
    assert one.n_failed == 2
    assert math.isnan(one.mean_ratio)
    assert math.isnan(one.mean_score)
    assert one.share_at_most_one == pytest.approx(5 / 6)
    assert "could not be computed" in one.ratio_interval().note
    assert "failed (2)" in render_aggregates({"model": one})


def test_aggregated_score_is_not_decided_by_a_time_without_scale():
    """Where the floor is just below the baseline a small loss is a huge score; in the mean it weighs by its size."""
    tables = [*times(1.0, 1.5, 1.8, 1.2, 1.3, seeds=1), *times(2.1, floor=1.9999, seeds=1)]
    one = aggregate(tables)["model"]
    assert one.score[0, 5] == pytest.approx(-1000)
    gains, gaps = np.array([1.0, 0.5, 0.2, 0.8, 0.7, -0.1]), np.array([1.0] * 5 + [0.0001])
    assert one.mean_score == pytest.approx(gains.sum() / gaps.sum())
    found = one.score_interval()
    assert 0 < found.low < one.mean_score < found.high
    solved = aggregate(times(*[1.9] * 6, floor=2.5))["model"]
    assert np.isnan(solved.score).all()
    assert math.isnan(solved.mean_score)
    assert solved.score_interval().note == "the scale is not clear of zero"
    assert solved.n_failed == 0


def test_aggregate_takes_the_score_at_equal_numbers():
    rng = np.random.default_rng(4)
    far = {"far": Baseline(rng.normal(size=(80, 3)) + 2, "")}
    models = {"true": [rng.normal(size=(80, 3))]}
    tables = [result_table(str(i), models, far, rng.normal(size=(80, 3)), {"W1": W1}, seed=i) for i in range(2)]
    one = aggregate(tables)["true"]
    for i, made in enumerate(tables):
        assert one.score[0, i] == pytest.approx(normalised_score(made, "true", "far", "W1"))
        assert one.ratio[0, i] == pytest.approx(made.row("true").mean("W1") / made.row("far").mean("W1"))
    assert (one.ratio < one.matched).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregate([]), "at least one table"),
        (lambda: aggregate([table((1.0,), metric=R2)], "R2"), "lower is better; R2 says 'higher is better'"),
        (lambda: aggregate([*times(1.0), *times(1.0, seeds=3)]), r"as many seeds in every table, .*got \[2, 3\]"),
        (lambda: aggregate([table((1.0,)), table((1.0,), metric=W1._replace(definition="other"))]), "two definitions"),
        (lambda: aggregate(times(1.0), models=["modell"]), "no row is called 'modell'"),
    ],
)
def test_bad_input_of_aggregate_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
