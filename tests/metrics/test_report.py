"""Tables: what they say when the model wins, loses or fails, and that nothing is hidden."""

import json
import math

import numpy as np
import pytest

from scjax.metrics.baselines import Baseline
from scjax.metrics.population import POPULATION_METRICS, Comparison, Metric, Score
from scjax.metrics.report import ResultTable, Row, normalised_score, render, result_table, to_json_dict, verdict

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
        ([(1.5, 1.5)], "BEATS the best training-free baseline, b0: 1.500 against 2.000, ratio 0.750.", "NOT"),
        ([(2.5, 2.5)], "DOES NOT BEAT the best training-free baseline, b0: 2.500 against 2.000, ratio 1.250.", "than"),
        ([(2.0, 2.0)], "DOES NOT BEAT", " BEATS"),
        (
            [(1.4, 2.4)],
            "b0: 1.900 against 2.000, ratio 0.950; the difference is smaller than the spread over d",
            "seeds",
        ),
        ([(1.4,), (2.4,)], "smaller than the spread over seeds, 0.7071", "draws"),
        ([(1.5, math.nan)], "model FAILED (1 values could not be computed", "BEAT"),
    ],
)
def test_verdict_says_it_plainly(model, says, does_not_say):
    line = verdict(table(*model), "model", "W1")
    assert says in line
    assert does_not_say not in line


def test_verdict_follows_the_direction():
    assert "BEATS the best training-free baseline, b1" in verdict(table((3.5,), metric=R2), "model", "R2")
    assert "DOES NOT BEAT the best training-free baseline, b1" in verdict(table((2.5,), metric=R2), "model", "R2")


def test_verdict_against_chosen_rows():
    assert "DOES NOT BEAT" in verdict(table((2.5,)), "model", "W1")
    assert "BEATS the best training-free baseline, b1" in verdict(table((2.5,)), "model", "W1", ["b1"])
    assert "no training-free baseline is defined" in verdict(table((2.5,)), "model", "W1", ["undefined"])


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
