"""Perturbation metrics against recorded values of cell-eval 0.8.2 and the tables of pdex behind them."""

import json

import numpy as np
import pytest
from goldens import absence, cases, load, require

from scjax.metrics.expression import CELL_EVAL_METRICS, differential_expression, score_perturbations
from scjax.metrics.rank_sum import rank_sum
from scjax.types import Population

KINDS = ("metrics_cell_eval",)
CASES = cases("scdfm", KINDS)
NOT_OURS = {"clustering_agreement"}  # Leiden clustering of igraph, the best of seven resolutions


@pytest.fixture(
    scope="module",
    params=CASES[KINDS[0]]
    or [pytest.param(None, marks=pytest.mark.skip(reason=absence("scdfm") or "no recording of the metrics"))],
)
def golden(request):
    require("scdfm")
    return load("scdfm", request.param)


def populations(golden, side):
    cells, labels = golden[f"in/X_{side}"], golden[f"in/pert_{side}"]
    control = json.loads(str(golden["meta_json"]))["control"]
    names = golden["out/perturbations"]
    parts = {name: tuple(sorted(part for part in name.split("+") if part != control)) for name in names}
    return {Population(parts[name]): cells[labels == name] for name in names}, cells[labels == control]


def test_all_metrics(golden):
    """On all cells of both sides, real controls for both, as the recording; 27 of its 28 names."""
    real, control = populations(golden, "real")
    pred, same_control = populations(golden, "pred")
    np.testing.assert_array_equal(control, same_control)
    ours = score_perturbations(pred, real, {"": control}, CELL_EVAL_METRICS)
    assert set(golden["out/metric_names"]) == set(ours) | NOT_OURS
    for name, want in zip(golden["out/metric_names"], golden["out/values"].T, strict=True):
        if name not in NOT_OURS:
            np.testing.assert_allclose(list(ours[name].values()), want, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("side", ["real", "pred"])
def test_differential_expression(golden, side):
    found, control = populations(golden, side)
    for name, cells in zip(golden["out/perturbations"], found.values(), strict=True):
        rows = golden[f"de_{side}/target"] == name
        np.testing.assert_array_equal(golden[f"de_{side}/feature"][rows], np.arange(rows.sum()))
        want = {key: golden[f"de_{side}/{key}"][rows] for key in ("p_value", "fdr", "log2_fold_change", "statistic")}
        ours = differential_expression(cells, control)
        np.testing.assert_array_equal(rank_sum(cells, control).statistic, want["statistic"])
        np.testing.assert_allclose(ours.p_value, want["p_value"], rtol=1e-9)
        np.testing.assert_allclose(ours.fdr, want["fdr"], rtol=1e-9)
        # The recording's means are sums in single precision, and a fold change near zero is their difference.
        np.testing.assert_allclose(ours.log2_fold_change, want["log2_fold_change"], rtol=1e-5, atol=2e-6)
