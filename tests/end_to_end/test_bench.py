"""The benchmark: what it would run, results that survive interruption and each other's failures, the report."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_perturbation
import tiny_series
from test_experiment import KillAt, Killed

import scjax.bench
from scjax.bench import bench, listed, report
from scjax.bench.grid import IN_FOLDER, VARIANTS, Cell, make_grid, shortened
from scjax.bench.report import comparisons, render
from scjax.check import one_of
from scjax.cli import main
from scjax.data.source import read_anndata
from scjax.data.splits import HoldOutTimes
from scjax.experiment import timeseries
from scjax.metrics.baselines import nearest_earlier
from scjax.metrics.expression import EXPRESSION_METRICS
from scjax.metrics.perturbation_report import PerturbationRow, PerturbationTable
from scjax.metrics.population import POPULATION_METRICS, Comparison, Score, wasserstein1
from scjax.metrics.report import ResultTable, Row
from scjax.presets import preset
from scjax.types import Population

# The largest of the table in the data's README that a copy of the time before is away, for each series.
NAIVE = {
    "ts_emt_cook2020": (3.0, 0.407),
    "ts_mesc_klein2015": (2.0, 19.17),
    "ts_hsmm_trapnell2014": (1.0, 36.21),
    "ts_bcell_stategra": (2.0 / 6, 12.69),
    "ts_embryo_guo2010": (5.0, 7.32),
    "ts_larry2d_weinreb2020": (4.0, 1.054),
    "ts_larry_weinreb2020_clones": (4.0, 19.57),
    "ts_mef_schiebinger2019_subset": (10.5, 13.18),
}


def tiny_cell(variant: str, experiment=tiny_series.EXPERIMENT, data: str = "series") -> Cell:
    series = data == "series"
    adata = tiny_series.make_adata() if series else tiny_perturbation.make_adata()
    return Cell(
        "scimf" if series else "scdfm", variant, data, "one", experiment, adata, f"{variant} settings", 4 * series
    )


GOOD, OTHER = tiny_cell("good"), tiny_cell("pairs", tiny_perturbation.EXPERIMENT, "perturbed")
BAD = tiny_cell("bad", replace(tiny_series.EXPERIMENT, split=HoldOutTimes(times=(3.0,))))


@pytest.fixture
def cells(monkeypatch):
    """The grid, to be filled."""
    found: list[Cell] = []
    monkeypatch.setattr(scjax.bench, "make_grid", lambda folder, **options: (found, ["other.h5ad"]))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A benchmark of three cells, the first of which cannot be trained; and the lines that it told."""
    out, lines = tmp_path_factory.mktemp("bench") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scjax.bench, "make_grid", lambda folder, **options: ([BAD, GOOD, OTHER], ["other.h5ad"]))
        done = bench(out, n_seeds=2, n_draws=2, tell=lines.append)
    return out, done, lines


def test_one_failing_cell_loses_no_other(finished):
    out, done, lines = finished
    assert done.failed == (BAD.name,)
    assert done.n_done == 2
    results = json.loads((out / "results.json").read_text())
    status = {result["name"]: result["status"] for result in results}
    assert status == {BAD.name: "failed", GOOD.name: "done", OTHER.name: "done"}
    bad = next(result for result in results if result["name"] == BAD.name)
    assert "3.0" in bad["error"]
    assert "split_times" in bad["traceback"]
    assert any(line.startswith("other.h5ad: no known data set") for line in lines)
    assert sum("FAILED" in line for line in lines) == 1
    assert f"- {BAD.name}: ValueError" in done.report
    assert (out / "report.md").read_text() == done.report


def test_results_of_a_cell_hold_settings_tables_and_comparisons(finished):
    out = finished[0]
    result = json.loads((out / "cells" / f"{GOOD.file_stem}.json").read_text())
    assert result["settings"]["n_seeds"] == 2
    assert "seed" not in result["settings"]["experiment"]
    assert result["failed_seeds"] == {}
    model = next(row for row in result["tables"][0]["rows"] if row["kind"] == "model")
    assert (model["name"], model["n_seeds"]) == ("scimf good", 2)
    one = next(c for c in result["comparisons"] if (c["metric"], c["baseline"]) == ("W1", "OT interpolation"))
    assert one["model"] == pytest.approx(model["scores"]["W1"]["mean"])
    assert one["spread"] == pytest.approx(model["scores"]["W1"]["sd_seeds"])
    assert sorted(p.name for p in (out / "runs" / GOOD.file_stem).iterdir()) == ["seed0", "seed1"]


def test_report_tells_ratios_metrics_and_wins(finished):
    out, done, _ = finished
    result = json.loads((out / "cells" / f"{GOOD.file_stem}.json").read_text())
    of_w1 = [c for c in result["comparisons"] if c["metric"] == "W1" and c["value"] is not None]
    ratio = of_w1[0]["model"] / min(c["value"] for c in of_w1)
    assert f"mean ratio {ratio:.3f} over 1 held-out times" in done.report
    assert "pearson_delta ↑" in done.report
    assert "| scimf good | W1 | OT interpolation |" in done.report
    assert "| scdfm pairs | l2 | additive |" in done.report
    assert "real vs real (ceiling)" in done.report


def test_what_is_done_is_not_done_again(finished, cells, monkeypatch):
    out, done, _ = finished
    cells += [GOOD, OTHER]
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    monkeypatch.setattr(scjax.bench, "train_seeds", None)
    again = bench(out, n_seeds=2, n_draws=2)
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    assert again.report == done.report
    assert (again.failed, again.n_done) == ((), 2)


def test_other_settings_are_not_mixed_in(finished, cells, tmp_path):
    out = finished[0]
    cells.append(GOOD)
    with pytest.raises(ValueError, match=r"holds results of other settings or data \(n_draws\)"):
        bench(out, n_seeds=2, n_draws=3)
    cells[:] = [GOOD._replace(experiment=replace(GOOD.experiment, n_steps=10))]
    with pytest.raises(ValueError, match=r"settings or data \(experiment\)"):
        bench(out, n_seeds=2, n_draws=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        bench(tmp_path)


def test_an_interrupted_cell_goes_on_from_its_checkpoints(finished, cells, tmp_path):
    out = tmp_path / "out"
    cells.append(GOOD)
    with pytest.raises(Killed):
        bench(out, n_seeds=2, n_draws=2, hooks=lambda experiment: [KillAt(16)])
    assert not list((out / "cells").iterdir())
    cells[:] = [GOOD._replace(experiment=replace(GOOD.experiment, log_every=2))]
    with pytest.raises(ValueError, match="holds a run of other settings"):
        bench(out, n_seeds=2, n_draws=2)
    cells[:] = [GOOD]
    assert bench(out, n_seeds=2, n_draws=2).failed == ()
    one, other = (json.loads((o / "cells" / f"{GOOD.file_stem}.json").read_text()) for o in (out, finished[0]))
    assert one["resumed"]
    assert not other["resumed"]
    assert one["settings"] == other["settings"]
    for a, b in zip(one["comparisons"], other["comparisons"], strict=True):
        assert a["model"] == pytest.approx(b["model"], rel=1e-3)


def test_a_cell_killed_before_its_first_checkpoint_begins_anew_beside_what_is_left(cells, tmp_path):
    cells.append(GOOD)
    with pytest.raises(Killed):
        bench(tmp_path / "out", n_seeds=2, n_draws=2, hooks=lambda experiment: [KillAt(4)])
    assert bench(tmp_path / "out", n_seeds=2, n_draws=2).failed == ()
    left = sorted(p.name for p in (tmp_path / "out" / "runs" / GOOD.file_stem).iterdir())
    assert left == ["seed0", "seed0.interrupted-1", "seed1", "seed1.interrupted-1"]


def test_ratios_over_times_and_over_sets():
    """Small sets count in the first mean alone; a time without a value counts as not won."""
    ratios = [("a", 4, 0.8), ("a", 4, 1.2), *[("b", 5, 0.9)] * 4, ("c", 3, 3.0), ("c", 3, None)]
    told = report._summary(ratios)
    assert told == (
        "mean ratio 1.229 over 7 held-out times, at most 1 at 5 of 8; sets with four times or more: 0.933 over 6 "
        "times, 0.950 over 2 sets, at most 1 at 5 of 6; 1 failed."
    )


def test_grid_of_the_shipped_sets():
    cells, unknown = make_grid()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len({cell.file_stem for cell in cells}) == len(names)
    assert unknown == []
    assert {cell.data for cell in cells} == {"klein", "norman", "mcfaline"}
    assert {(cell.system, cell.variant) for cell in cells} == {(s, v) for s in VARIANTS for v in VARIANTS[s]}
    assert [name for name in names if name.startswith("scimf/scjax")] == [
        "scimf/scjax/klein/time 2",
        "scimf/scjax/klein/time 4",
    ]
    first = next(cell for cell in cells if cell.name == "scimf/scjax/klein/time 2")
    series = preset("scimf/series").experiment
    assert (first.experiment.model, first.experiment.optimizer) == (series.model, series.optimizer)
    assert (first.experiment.time_scale, first.experiment.preprocess.unit_variance) == ("mean_gap", True)
    assert first.experiment.preprocess.n_components == 10
    only, _ = make_grid(systems=("scdfm",), only=("*/norman/*",), n_steps=7)
    assert [cell.name for cell in only] == ["scdfm/scjax/norman/combo_seen2"]
    assert (only[0].experiment.n_steps, only[0].experiment.optimizer.n_warmup) == (7, 6)


def test_what_the_grid_refuses(tmp_path):
    for options, message in (
        ({"only": ("scimf/*/nothing/*",)}, "fits no cell of the grid"),
        ({"systems": ("scimv",)}, "Did you mean 'scimf'"),
        ({"n_steps": 0}, "n_steps must be at least 1"),
        ({"folder": tmp_path / "nowhere"}, "there is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            make_grid(**options)
    (tmp_path / "mine.h5ad").write_bytes(b"")
    assert make_grid(tmp_path, systems=("scdfm",))[1] == ["mine.h5ad"]


@pytest.mark.parametrize(("n_steps", "scan_steps"), [(1, 1), (12, 6), (13, 1), (500, 10)])
def test_shortened(n_steps, scan_steps):
    experiment = shortened(preset("perturbdiff/kang").experiment, n_steps)
    assert (experiment.n_steps, experiment.scan_steps, experiment.checkpoint_every) == (n_steps, scan_steps, n_steps)


@pytest.mark.parametrize("stem", NAIVE)
def test_spaces_are_those_of_the_measured_baselines(shared_data, stem):
    """The preceding snapshot is as far away, in 10 dimensions, as the README of the data says."""
    data, (time, wanted) = IN_FOLDER[stem], NAIVE[stem]
    adata = data.ready(read_anndata(shared_data / f"{stem}.h5ad"))
    rule = data.splits(adata)[f"time {time:g}"]
    experiment = timeseries.TimeSeriesExperiment(
        model=replace(preset("scimf/klein").experiment.model, n_dims=data.n_dims),
        spec=data.spec,
        split=rule,
        preprocess=data.preprocess,
    )
    prepared = timeseries.prepare_time_series(adata, experiment.spec, experiment.split, experiment.preprocess)
    assert prepared.n_dims == data.n_dims
    snapshots = {t: prepared.population(t) for t in prepared.split.train}
    found = wasserstein1(nearest_earlier(snapshots, rule.times[0]), prepared.population(rule.times[0]))
    assert found == pytest.approx(wanted, abs=0.006 if wanted > 2 else 0.0006)


def test_known_perturbation_sets_prepare_in_their_splits(shared_data):
    cells, unknown = make_grid(shared_data, only=("*/kang/*", "*/norman/*", "*/mcfaline/*"))
    assert unknown == []
    assert len(cells) == 1 + 2 * 3 + 2 * 5
    for cell in cells:
        one_of(
            "cell_type", cell.split.removeprefix("without "), {*map(str, cell.adata.obs["cell_type"]), "combo_seen2"}
        )


def scored(name, kind, *means):
    comparisons_ = tuple(Comparison({"W1": Score((m - 0.1, m + 0.1))}, 10, 2, 0, "", 0) for m in means)
    return Row(name, kind, comparisons_)


@pytest.mark.parametrize(
    ("means", "outcomes"),
    [
        ((1.0, 1.2, 1.4), ["win", "tie", "lose", None]),  # 1.2 +- 0.2 against 1.5, 1.1, 0.9
        ((1.0,), ["win", "tie", "tie", None]),  # +- 0.141, over draws
        ((1.0, math.nan), ["failed", "failed", "failed", None]),
    ],
)
def test_win_tie_and_lose_by_the_spread(means, outcomes):
    rows = [scored("model", "model", *means)]
    rows += [scored(f"rule {value}", "baseline", value) for value in (1.5, 1.1, 0.9)]
    rows += [Row("undefined", "baseline", ()), scored("real vs real (floor)", "floor", 0.5)]
    table = ResultTable("held-out time 2", (POPULATION_METRICS["W1"],), tuple(rows), 10, 2, 0)
    assert [one["outcome"] for one in comparisons(table, "model")] == outcomes


def test_perturbations_are_compared_where_the_rule_predicts():
    """Of two populations the rule knows the second; of the ratio 1 is best, so 0.5 and 2 are equally bad."""
    metrics = tuple(EXPRESSION_METRICS[name] for name in ("r2", "variance_ratio"))

    def row(name, kind, values, ratios, known=(True, True)):
        of = lambda v: np.array(v, float)[:, None, :]  # noqa: E731
        counted = {m.name: np.array([known]) for m in metrics}
        return PerturbationRow(name, kind, {"r2": of(values), "variance_ratio": of(ratios)}, counted)

    rows = (
        row("model", "model", [[0.1, 0.9], [0.3, 0.8]], [[9.0, 2.0], [9.0, 2.0]]),
        row("rule", "baseline", [[0.9, 0.5]], [[1.0, 0.4]], (False, True)),
        row("none", "baseline", [[0.9, 0.5]], [[1.0, 0.4]], (False, False)),
    )
    table = PerturbationTable(
        "two", metrics, rows, (Population(("A",)), Population(("B",))), (5, 5), (5, 5), 1, 3, 4, seed=0
    )
    found = {(one["metric"], one["baseline"]): one for one in comparisons(table, "model")}
    assert found["r2", "rule"]["model"] == pytest.approx(0.85)
    assert found["r2", "rule"]["outcome"] == "win"
    assert found["variance_ratio", "rule"]["outcome"] == "win"  # |log 2| < |log 0.4|
    assert found["r2", "none"]["outcome"] is None


def test_report_of_nothing_says_so():
    assert render([]) == "# Benchmark\n\nNo cell is done.\n"


def test_command_lists_and_fails_with_status_1(cells, tmp_path, capsys, monkeypatch):
    cells += [GOOD, BAD]
    main(["bench", "--out", str(tmp_path / "out"), "--dry-run"])
    assert f"{GOOD.name}: 20 steps, to do" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(scjax.bench, "bench", lambda out, **options: scjax.bench.Outcome("the report", (BAD.name,), 1))
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    told = capsys.readouterr()
    assert "the report" in told.out
    assert BAD.name in told.err


def test_listed_knows_what_is_done(finished, cells):
    cells += [BAD, GOOD]
    lines = listed(finished[0]).splitlines()
    assert lines[:2] == [f"{BAD.name}: 20 steps, failed", f"{GOOD.name}: 20 steps, done"]
