"""Tables of perturbation predictions: what they say when the model wins, loses or fails; nothing is hidden."""

import json
import math

import numpy as np
import pytest

from scjax.metrics.expression import EXPRESSION_METRICS
from scjax.metrics.perturbation_baselines import RULES
from scjax.metrics.perturbation_report import (
    DEFAULT_METRICS,
    MOST_CELLS,
    WIDTH,
    PerturbationRow,
    PerturbationTable,
    judge,
    normalised_score,
    perturbation_table,
    render,
    to_json_dict,
    verdict,
)
from scjax.metrics.population import POPULATION_METRICS, energy_distance
from scjax.types import Population

CONTROL, A, B, C = (Population(tuple(p)) for p in ("", "A", "B", "C"))
AB, AC, D = Population(("A", "B")), Population(("A", "C")), Population(("D",))
GENES = tuple(f"g{i}" for i in range(12))
CHEAP = {name: DEFAULT_METRICS[name] for name in ("pearson_delta", "l2", "de_direction_match", "variance_ratio")}


@pytest.fixture(scope="module")
def world():
    """Four levels of expression, effects that add but for a surprise in A+B, and cells drawn from it."""
    rng = np.random.default_rng(0)
    level = np.linspace(1, 4, len(GENES))
    effects = {part: rng.normal(size=len(GENES)) for part in "ABCD"}
    surprise = {AB: rng.normal(size=len(GENES))}

    def cells(population, n, seed):
        mean = level + sum((effects[part] for part in population.perturbation), np.zeros(len(GENES)))
        noise = np.random.default_rng(seed).normal(size=(n, len(GENES)))
        return (mean + surprise.get(population, 0) + 0.7 * noise).astype(np.float32)

    training = {p: cells(p, 80, i) for i, p in enumerate((CONTROL, A, B, C))}
    real = {p: cells(p, n, 10 + n) for p, n in ((AB, 60), (AC, 50), (D, 44))}
    return training, real, cells


@pytest.fixture(scope="module")
def table(world):
    training, real, cells = world
    models = {
        "good": [{p: cells(p, 40, 100 + s) for p in real} for s in range(2)],
        "control again": [{p: training[CONTROL][:30] for p in real}],
        "broken": [{p: cells(p, 40, 7) * (np.nan if p == AC else 1) for p in real}],
    }
    return perturbation_table(
        "toy", models, training, real, n_draws=3, seed=0, gene_names=GENES, provenance={"split": "abc"}
    )


def test_rows_and_numbers_of_cells(table, world):
    """Half of the real cells or the smallest prediction: the same for every row, the ceiling too."""
    assert [row.kind for row in table.rows] == ["model"] * 3 + ["baseline"] * len(RULES) + ["floor"]
    assert [row.name for row in table.rows[3:-1]] == list(RULES)
    assert table.n_cells == (30, 25, 22)
    assert table.n_real == (60, 50, 44)
    assert [m.name for m in table.metrics] == list(DEFAULT_METRICS)
    good = table.row("good")
    assert good.values["energy_distance"].shape == (2, 3, 3)
    assert good.values["l2"].shape == (2, 1, 3)


def test_values_are_those_of_the_metrics(table, world):
    training, real, cells = world
    pred = cells(AB, 40, 100)
    assert table.row("good").by_population("l2")[0, 0] == pytest.approx(
        np.linalg.norm(pred.mean(0, dtype=np.float64) - real[AB].mean(0, dtype=np.float64))
    )
    draws = table.row("good").values["energy_distance"][0, :, 0]
    expected = [
        energy_distance(
            pred[np.random.default_rng([0, d, 1]).choice(40, 30, replace=False)],
            real[AB][np.random.default_rng([0, d, 0]).choice(60, 30, replace=False)],
        )
        for d in range(3)
    ]
    np.testing.assert_allclose(draws, expected, rtol=1e-4)  # in single precision
    additive = training[A].mean(0) + training[C].mean(0) - training[CONTROL].mean(0)
    assert table.row("additive").by_population("l2")[0, 1] == pytest.approx(
        np.linalg.norm(additive - real[AC].mean(0)), rel=1e-4
    )


def test_a_model_with_the_truth_wins(table):
    """It knows the surprise of A+B and the effect of D, which no baseline can; real against real is about as good."""
    for name in ("pearson_delta", "l2", "energy_distance"):
        line = verdict(table, "good", name)
        assert line.startswith(f"{name}: good BEATS the best training-free baseline, ")
        assert "(0 that baseline, 1 real vs real)" in line
        baselines = [r.name for r in table.of_kind("baseline") if math.isfinite(r.mean(name))]
        assert 0.8 < normalised_score(table, "good", baselines[0], name) < 1.3
    assert "LOSES TO" in verdict(table, "control again", "l2")
    assert normalised_score(table, "control", "control", "l2") == 0
    assert table.row("control again").mean("l2") == pytest.approx(table.row("control").mean("l2"), rel=0.1)


def test_a_baseline_is_compared_where_it_predicts(table):
    """Nothing is additive about D: the rule counts on two populations, and so does the comparison with it."""
    row = table.row("additive")
    np.testing.assert_array_equal(row.has_value("l2"), [True, True, False])
    assert row.n_undefined("l2") == 1
    assert row.n_failed("l2") == 0
    assert "1 of 3 populations not predicted (D: not defined: not a combination)" in row.note
    assert "additive (on the 2 populations that it predicts)" in verdict(table, "good", "l2", ["additive"])
    assert "better on 1 of 2 populations" in verdict(
        table, "good", "l2", ["additive"]
    ) or "better on 2 of 2" in verdict(table, "good", "l2", ["additive"])
    assert "no training-free baseline has a value" in verdict(table, "good", "l2", ["shift"])


def test_failures_are_counted_and_never_dropped(table):
    row = table.row("broken")
    assert row.n_nonfinite == 40
    for metric in table.metrics:
        over_all = metric.name == "discrimination_score_cosine"
        assert row.n_failed(metric.name) == 1, metric.name
        assert math.isnan(row.mean(metric.name))
        assert math.isnan(row.median(metric.name))
        assert np.isfinite(row.by_population(metric.name)[0, [0, 2]]).all() or over_all
    assert "broken FAILED (1 values could not be computed, 40 predicted cells are not finite)" in verdict(
        table, "broken", "l2"
    )
    text = render(table)
    assert "failed (1)" in text
    assert "broken in l2 1" in text
    assert "40 predicted cells are not finite" in text


def test_no_value_is_not_failure(table):
    """The control has no delta to correlate, the training mean none of its own: said so, and counted."""
    assert math.isnan(table.row("control").mean("pearson_delta"))
    assert math.isnan(table.row("mean of perturbations").mean("pearson_delta_hat"))
    assert "no value (3)" in render(table)
    assert "control in pearson_delta 3" in render(table)


def test_what_the_real_cells_lack_counts_for_nobody(world):
    """One population in its context cannot be confused with another: the column is empty for all, and says why."""
    training, real, cells = world
    made = perturbation_table(
        "one",
        {"m": [{D: cells(D, 30, 1)}]},
        training,
        {D: real[D]},
        {"d": EXPRESSION_METRICS["discrimination_score_l1"], "l2": EXPRESSION_METRICS["l2"]},
        seed=0,
        gene_names=GENES,
    )
    assert not any(row.has_value("discrimination_score_l1").any() for row in made.rows)
    text = render(made)
    assert "discrimination_score_l1: not even the real cells have a value for 1 of 1 population." in text
    assert "Values that could not be computed: 0." in text
    assert "not even the real cells" in verdict(made, "m", "discrimination_score_l1")


def test_text_has_all_of_it(table):
    text = render(table)
    lines = text.splitlines()
    body = lines[: max(i for i, line in enumerate(lines) if set(line) == {"-"})]
    assert max(map(len, body)) <= WIDTH
    for metric in table.metrics:
        assert f"{metric.name} [{metric.unit}]: {metric.definition}." in text
    for word in ("↑", "↓", "→1", "±", "22 to 30 cells of either side, mean of 3 draws", "real controls on both sides"):
        assert word in text
    middle = render(table, median=True)
    assert middle != text
    assert "Median over 3 populations of 44 to 60 real cells, 12 genes; 3 training perturbations." in middle
    assert f"{table.row('good').median('l2'):.4f}" in middle


def test_json_holds_every_population_and_no_nan(table):
    again = json.loads(json.dumps(to_json_dict(table), allow_nan=False))
    assert again["populations"][0] == {"condition": "A+B", "context": "", "n_real": 60, "n_cells_per_draw": 30}
    assert again["provenance"] == {"split": "abc"}
    rows = {row["name"]: row for row in again["rows"]}
    scores = rows["good"]["scores"]["l2"]
    np.testing.assert_allclose(scores["by_population"], table.row("good").by_population("l2"))
    assert scores["mean"] == pytest.approx(np.mean(scores["by_population"]))
    assert rows["good"]["n_seeds"] == 2
    assert rows["broken"]["scores"]["l2"]["by_population"][0][1] is None
    assert rows["additive"]["scores"]["l2"]["n_undefined"] == 1
    assert rows["good"]["scores"]["energy_distance"]["sd_draws"][0] > 0
    assert rows["good"]["scores"]["l2"]["sd_draws"] == [0, 0, 0]


def test_draws_follow_the_seed(world):
    training, real, cells = world
    models = {"m": [{p: cells(p, 300, 1) for p in real}]}
    settings = {"gene_names": GENES, "n_draws": 2}
    metrics = {"Energy": POPULATION_METRICS["Energy"], "l2": EXPRESSION_METRICS["l2"]}
    made = [perturbation_table("t", models, training, real, metrics, seed=s, n_cells=10, **settings) for s in (0, 0, 1)]
    assert made[0].n_cells == (10, 10, 10)
    first, again, other = (t.row("m").values["Energy"] for t in made)
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    np.testing.assert_array_equal(made[0].row("m").values["l2"], made[2].row("m").values["l2"])
    assert MOST_CELLS >= 100


def row(name, kind, *values, metric="l2", counted=None):
    values = np.array(values, np.float64)[:, None, :]
    counted = np.ones(values.shape[1:], bool) if counted is None else np.array([counted])
    return PerturbationRow(name, kind, {metric: values}, {metric: counted})


def by_hand(*rows, metric="l2"):
    n = rows[0].values[metric].shape[2]
    names = tuple(Population((f"P{i}",)) for i in range(n))
    return PerturbationTable("t", (EXPRESSION_METRICS[metric],), rows, names, (9,) * n, (4,) * n, 1, 5, 3, 0)


def test_the_best_baseline_is_the_one_least_beaten():
    """Also where baselines are defined on different populations, so that their means cannot be compared."""
    easy = row("easy", "baseline", [1.1, 99, 99], counted=[True, False, False])
    hard = row("hard", "baseline", [4.0, 4.0, 4.0])
    made = by_hand(row("m", "model", [1.0, 2.0, 3.0]), easy, hard, row("r", "floor", [0.5, 0.5, 0.5]))
    line = verdict(made, "m", "l2")
    assert (
        "BEATS the best training-free baseline, easy (on the 1 population that it predicts): 1.000 against 1.100"
        in line
    )
    assert "better on" not in line, "one population has been told"
    assert "sign test" not in line
    assert normalised_score(made, "m", "easy", "l2") == pytest.approx(0.1 / 0.6)
    assert normalised_score(made, "m", "hard", "l2") == pytest.approx(2 / 3.5)


def test_spread_over_seeds_and_scales():
    base, real = row("b", "baseline", [2.0, 2.0]), row("r", "floor", [1.0, 1.0])
    made = by_hand(row("m", "model", [1.0, 1.0], [2.6, 2.6]), base, real)
    assert made.row("m").sd_seeds("l2") == pytest.approx(1.6 / 2**0.5)
    assert base.sd_seeds("l2") is None
    assert "m TIES WITH" in verdict(made, "m", "l2")
    assert "smaller than the spread over seeds, 1.131" in verdict(made, "m", "l2")
    worse = by_hand(row("m", "model", [4.0, 4.0]), base, real)
    assert normalised_score(worse, "m", "b", "l2") == -2
    solved = by_hand(row("m", "model", [4.0, 4.0]), base, row("r", "floor", [2.5, 2.5]))
    assert math.isnan(normalised_score(solved, "m", "b", "l2"))
    assert "that baseline is as good as real vs real already" in verdict(solved, "m", "l2")


@pytest.mark.parametrize(("ours", "wins"), [(0.9, True), (1.2, False), (0.7, False), (1 / 1.1, True)])
def test_one_is_best(ours, wins):
    """Of two ratios the one nearer to 1 by its logarithm wins."""
    rows = (
        row("m", "model", [ours, ours], metric="variance_ratio"),
        row("b", "baseline", [1.15, 1.15], metric="variance_ratio"),
    )
    line = verdict(by_hand(*rows, metric="variance_ratio"), "m", "variance_ratio")
    assert ("LOSES TO" in line) != wins
    assert ("BEATS" in line) == wins


def test_no_normalised_score_where_the_scale_is_tiny():
    """The score is there for who asks for it; the line says why it tells nothing."""
    base = row("b", "baseline", [2.0, 2.0])
    for real, told in ((1.0, "normalised score -8.00 (0 that"), (1.5, "normalised score below -10 (0 that")):
        made = by_hand(row("m", "model", [10.0, 10.0]), base, row("r", "floor", [real, real]))
        assert told in verdict(made, "m", "l2")
    assert normalised_score(made, "m", "b", "l2") == -16
    equal = by_hand(row("m", "model", [2.0001, 2.0001]), base, row("r", "floor", [1.0, 1.0]))
    assert "normalised score 0.00 " in verdict(equal, "m", "l2")


def test_test_and_interval_need_five_populations():
    for n in (4, 5):
        line = verdict(by_hand(row("m", "model", [1.0] * n), row("b", "baseline", [2.0] * n)), "m", "l2")
        assert f"better on {n} of {n} populations" in line
        assert ("sign test p = 0.062" in line) == ("no interval" not in line) == (n == 5)


def test_rows_and_columns_without_a_value_are_not_in_the_text(world):
    """They are in the JSON, and the foot says why."""
    training, real, cells = world
    metrics = {name: EXPRESSION_METRICS[name] for name in ("l2", "discrimination_score_l1")}
    models = {"m": [{D: cells(D, 30, 1)}]}
    made = perturbation_table("one", models, training, {D: real[D]}, metrics, seed=0, gene_names=GENES)
    text = render(made)
    body, foot = text[: text.rindex("---")], text[text.rindex("---") :]
    assert "additive" not in body
    assert "additive: " in foot
    assert "1 of 1 population not predicted (D: not defined: not a combination)" in foot
    assert "discrimination" not in body
    assert "discrimination_score_l1: not even the real cells have a value for 1 of 1 population." in foot
    plain = to_json_dict(made)
    assert "additive" in {one["name"] for one in plain["rows"]}
    assert "discrimination_score_l1" in plain["rows"][0]["scores"]


def test_counts_have_no_winner():
    rows = (row("m", "model", [3.0, 4.0], metric="de_nsig_counts_pred"),)
    assert "without a better or worse" in verdict(
        by_hand(*rows, metric="de_nsig_counts_pred"), "m", "de_nsig_counts_pred"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"m": []}}, "predictions of model 'm' must be at least 1"),
        ({"models": {"m": [{}]}}, r"must hold the populations of real; it lacks D"),
        ({"models": {"m": [{D: np.ones((9, 12)), A: np.ones((9, 12))}]}}, "it has A, which is not in real"),
        ({"models": {"m": [{D: np.ones((1, 12))}]}}, "cells that model 'm' predicts for D must be at least 2"),
        ({"real": {}}, "real must hold the cells"),
        ({"real": {D: np.ones((3, 12))}}, "real cells of D must be at least 4"),
        ({"real": {D: np.full((9, 12), np.nan)}}, r"real\[D\] must hold finite"),
        ({"real": {A: np.ones((9, 12))}, "models": {}}, "A is among the training populations"),
        ({"n_draws": 0}, "n_draws must be at least 1"),
        ({"n_cells": 1}, "n_cells must be at least 2"),
        ({"gene_names": ("x",)}, "must name the 12 columns"),
    ],
)
def test_bad_input_is_named(world, change, message):
    training, real, cells = world
    call = {"models": {"m": [{D: cells(D, 9, 0)}]}, "real": {D: real[D]}, "seed": 0, "gene_names": GENES, **change}
    with pytest.raises(ValueError, match=message):
        perturbation_table("t", call.pop("models"), training, call.pop("real"), CHEAP, **call)


def test_unknown_names_are_answered(table):
    with pytest.raises(ValueError, match="no row is called 'god'. Did you mean 'good'"):
        verdict(table, "god", "l2")
    with pytest.raises(ValueError, match="no metric is called 'l3'"):
        verdict(table, "good", "l3")


def seven(gain, seeds=3):
    """Populations of very different difficulty; the model is better by `gain` on each, seeds differ by a hundredth."""
    hard = np.array([1.0, 2, 4, 8, 16, 32, 64])
    model = [hard - gain + 0.01 * s for s in range(seeds)]
    return by_hand(row("m", "model", *model), row("b", "baseline", hard), row("r", "floor", hard / 4))


def test_interval_is_over_populations_and_seeds():
    made = seven(0.5)
    found = made.row("m").interval("l2")
    assert found.low < made.row("m").mean("l2") < found.high
    assert (found.n_units, found.n_seeds) == (7, 3)
    middle = made.row("m").interval("l2", statistic="median")
    assert middle.high <= 64 - 0.4
    assert by_hand(row("m", "model", [1.0, 2.0])).row("m").interval("l2").note == "2 units, fewer than 5"
    some = row("m", "model", [1.0, 2, 3, 4, 5, 6, np.nan], counted=[True] * 6 + [False])
    assert some.interval("l2").n_units == 6
    assert "could not be computed" in row("m", "model", [1.0, 2, 3, 4, 5, np.nan]).interval("l2").note


def test_verdict_has_the_paired_interval_of_the_difference():
    """The populations lie far apart and the difference does not; one that is not there holds zero."""
    line = verdict(seven(0.5), "m", "l2")
    assert "; difference -0.4900 [-0.5000, -0.4800];" in line
    assert "difference 0.5100 [0.5000, 0.5200]" in verdict(seven(-0.5), "m", "l2")
    assert ", which holds 0;" in verdict(seven(0.01), "m", "l2")
    for gain, found in ((0.5, "win"), (0.01, "tie"), (-0.5, "lose")):
        assert judge(seven(gain), "m", "l2").outcome == found
    assert "(no interval: fewer than 5 populations)" in verdict(
        by_hand(row("m", "model", [1.0]), row("b", "baseline", [2.0])), "m", "l2"
    )


def test_difference_has_the_sign_of_the_metric():
    rows = (
        row("m", "model", [0.9] * 6, metric="pearson_delta"),
        row("b", "baseline", [0.5] * 6, metric="pearson_delta"),
    )
    assert "difference 0.4000 [0.4000, 0.4000]" in verdict(by_hand(*rows, metric="pearson_delta"), "m", "pearson_delta")
    rows = (
        row("m", "model", [2.0] * 6, metric="variance_ratio"),
        row("b", "baseline", [0.25] * 6, metric="variance_ratio"),
    )
    line = verdict(by_hand(*rows, metric="variance_ratio"), "m", "variance_ratio")
    assert "difference of |log| -0.6931 [-0.6931, -0.6931]" in line


def test_intervals_stand_below_their_values_in_text_and_in_json():
    made = seven(0.5)
    found = made.row("m").interval("l2")
    text = render(made)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("m "))
    assert lines[at + 1].strip() == f"[{found.low:.2f}, {found.high:.2f}]"
    assert "95 % bootstrap interval of the mean over populations and seeds, 2000 resamples" in text
    assert "interval of the median" in render(made, median=True)
    plain = json.loads(json.dumps(to_json_dict(made), allow_nan=False))["rows"][0]["scores"]["l2"]["interval"]
    assert (plain["low"], plain["high"], plain["n_units"]) == (found.low, found.high, 7)


def test_no_intervals_of_three_populations(table):
    text = render(table)
    assert "No bootstrap intervals: fewer than 5 populations with a value." in text
    assert to_json_dict(table)["rows"][0]["scores"]["l2"]["interval"]["note"] == "3 units, fewer than 5"
