"""The benchmark of held-out times: nothing of the held-out time in the space, and numbers that mean what they say."""

import importlib
import itertools
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from scjax.data.synthetic import GaussianShift

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TIMES = (0.0, 1.0, 2.0, 3.0)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("series_scores")


def a_set(folder, name, held_out_scale=1.0):
    """Twelve genes at four times; the cells of time 2 may be stretched."""
    rng = np.random.default_rng(0)
    x, time = rng.normal(size=(80, 12)) + np.repeat(np.arange(4), 20)[:, None], np.repeat(TIMES, 20)
    x[time == 2.0] *= held_out_scale
    obs = pd.DataFrame({"time": time}, index=[f"c{i}" for i in range(80)])
    anndata.AnnData(x.astype(np.float32), obs=obs).write_h5ad(folder / f"{name}.h5ad")


def test_the_space_does_not_see_the_held_out_time(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FILES", {"klein": "set"})
    found = []
    for scale in (1.0, 50.0):
        a_set(tmp_path, "set", scale)
        found.append(dict(script.questions("klein", tmp_path)))
    before, after = found
    assert list(before) == [1.0, 2.0]
    train = before[2.0].time != 2.0
    np.testing.assert_allclose(before[2.0].x[train], after[2.0].x[train])
    assert not np.allclose(before[1.0].x[train], after[1.0].x[train]), "for time 1, time 2 is a training time"
    assert before[2.0].x.shape == (80, script.N_DIMS)
    np.testing.assert_allclose(before[2.0].x[train].mean(axis=0), 0.0, atol=1e-6)


def test_a_question_from_training_to_summary(script):
    """Two steps of training: every row at equal cell numbers, the ratio that of its table, none of the cells lost."""
    world = GaussianShift(velocity=(2.0, 0.0, 0.0, 0.0)).simulate(TIMES, seed=0, n_cells=30)
    table, unit = script.scores("klein", world, 1.0, 2, 2)
    train = world.x[world.time != 1.0]
    assert unit == pytest.approx(np.sqrt(train.var(axis=0).mean()))
    assert [row.kind for row in table.rows] == ["model"] * 2 + ["baseline"] * 4 + ["floor"]
    row = script.verdict("klein", 1.0, table) | {"unit": unit, "seconds": 1.0}
    assert row["n_cells"] == table.n_cells == 30
    assert {c.n_cells for r in table.rows if r.kind != "floor" for c in r.comparisons} == {30}
    assert len(row["ratio_of_seeds"]) == 2
    assert len(set(row["ratio_of_seeds"])) == 2, "each seed is a training of its own"
    least = min(r.mean("W1") for r in table.of_kind("baseline"))
    assert row["ratio"] == pytest.approx(table.row("scIMF").mean("W1") / least)
    assert row["best"] in script.line(row)


def test_what_is_wanted_is_counted(script):
    """Sets count alike in the mean; small sets (three times) and the world do not count."""
    ratios = {"klein": (0.8, 1.2), "guo": (0.9, 0.9, 0.9, 0.9), "mef": (3.0,), "world": (5.0,)}
    rows = [
        {"set": name, "held_out": float(i), "ratio": r, "ratio_together": r / 2, "excess": 0.25}
        for name, of_set in ratios.items()
        for i, r in zip(itertools.count(1), of_set, strict=False)
    ]
    told = script.summary(rows)
    assert "mean over sets 0.950" in told
    assert "over times 0.933; at most 1 on 5 of 6 times" in told
    assert "scIMF, sets with four times or more: mean over sets 0.950" in told
    assert "together, sets with four times or more: mean over sets 0.475" in told
    assert "mef: W1 / best training-free 3.000" in told
    assert "by 0.25 of the baseline's excess" in told
