"""Files of predicted cells of any origin beside real ones: what is compared, what is refused, what is written."""

import csv
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import tiny_perturbation
import tiny_series
from scipy import sparse
from test_cli import refused

from scjax.cli import main
from scjax.data.spec import DataSpec
from scjax.data.splits import (
    HoldOutConditions,
    HoldOutTimes,
    save_split,
    split_populations,
    split_times,
)
from scjax.experiment import evaluate_files
from scjax.experiment.evidence import PerturbationEvidence, SeriesEvidence
from scjax.metrics.expression import EXPRESSION_METRICS
from scjax.metrics.perturbation_report import perturbation_table
from scjax.metrics.population import POPULATION_METRICS
from scjax.types import Population

SPEC = DataSpec(space="lognormalised", perturbation="drug", control="DMSO", covariates=("line",))
THEIRS = DataSpec(space="lognormalised", perturbation="what", control="none", covariates=("where",))
METRICS = {name: EXPRESSION_METRICS[name] for name in ("pearson_delta", "l2", "overlap_at_N")}
SERIES = {"W1": POPULATION_METRICS["W1"]}
DAYS = DataSpec(space="latent", expression="obsm/X_pca", time="day")
GENES = [f"g{i}" for i in range(8)]
HELD_OUT = ("a+b",)


def cells(names, columns, spelled, seed=0, genes=GENES):
    """Log-normalised cells whose names (condition, line) move a few genes."""
    rng = np.random.default_rng(seed)
    effect = {part: np.random.default_rng([9, ord(part)]).normal(size=8) for part in "abc"}
    level = np.array([1 + sum((effect[p] for p in name.split("+") if p in effect), np.zeros(8)) for name, _ in names])
    x = np.maximum(level + 0.5 * rng.normal(size=level.shape), 0).astype(np.float32)
    obs = pd.DataFrame(
        {columns[0]: [spelled.get(name, name) for name, _ in names], columns[1]: [line for _, line in names]},
        index=[f"c{i}" for i in range(len(names))],
    )
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=GENES))[:, list(genes)].copy()


def make_real():
    sizes = {"control": 14, "a": 9, "b": 10, "c": 8, "a+b": 12}
    names = [(name, line) for line in ("K", "L") for name, n in sizes.items() for _ in range(n)]
    return cells(names, ("drug", "line"), {"control": "DMSO"})


def make_predicted(seed=1, genes=GENES):
    """Other columns, another order of names and genes, and control cells, which nobody uses."""
    names = [(name, line) for line in ("L", "K") for name in ("control", "a+b") for _ in range(7)]
    return cells(names, ("what", "where"), {"control": "none", "a+b": "b+a"}, seed, genes)


@pytest.fixture(scope="module")
def real():
    return make_real()


def evaluated(predicted, real, **options):
    options = {"spec": SPEC, "predicted_spec": THEIRS, "metrics": METRICS, "n_draws": 2, **options}
    return evaluate_files({"tool": [predicted]} if not isinstance(predicted, dict) else predicted, real, **options)


@pytest.fixture(scope="module")
def table_and_evidence(real):
    keep = []
    shuffled = [GENES[i] for i in (3, 0, 7, 1, 2, 6, 5, 4)]
    (table,) = evaluated({"tool": [make_predicted(genes=shuffled), make_predicted(2)]}, real, keep=keep)
    return table, *keep


def test_the_same_as_the_table_of_arrays(real, table_and_evidence):
    """Aligned by gene and by condition, with real controls, and baselines that know the rest of the real cells."""
    table, _ = table_and_evidence
    of = real.obs.groupby(["drug", "line"], observed=True).indices
    x = {kind: np.asarray(real.X[rows]) for kind, rows in of.items()}
    training = {Population((c,) if c != "DMSO" else (), k): v for (c, k), v in x.items() if c != "a+b"}
    truth = {Population(("a", "b"), k): x["a+b", k] for k in "KL"}
    made = [
        {p: np.asarray(one[(one.obs.what == "b+a") & (one.obs["where"] == p.context)].X) for p in truth}
        for one in (make_predicted(), make_predicted(2))
    ]
    expected = perturbation_table("", {"tool": made}, training, truth, METRICS, n_draws=2, seed=0, gene_names=GENES)
    assert table.populations == expected.populations
    for row, other in zip(table.rows, expected.rows, strict=True):
        assert row.name == other.name
        for metric in METRICS:
            np.testing.assert_allclose(row.values[metric], other.values[metric], rtol=1e-6, atol=1e-9)
    assert np.isfinite(table.row("tool").mean("pearson_delta"))
    assert table.row("additive").mean("l2") < table.row("control").mean("l2")


def test_what_the_table_tells(table_and_evidence):
    table, evidence = table_and_evidence
    assert table.title.startswith("all 2 predicted populations, unseen: combination (2); the 28 real control cells")
    told = table.provenance
    assert told["split"]["test"] == ["a+b (K)", "a+b (L)"]
    assert told["split"]["training"] == "what real holds besides what is predicted"
    assert told["predicted_and_not_used"]["tool"][0] == {"control (K)": 7, "control (L)": 7}
    assert told["data"]["n_cells"] == 106
    assert len(told["data"]["digest"]) == 32
    json.dumps(dict(told))
    assert isinstance(evidence, PerturbationEvidence)
    assert {p.condition for p in evidence.shown} == {"a+b"}
    assert evidence.n_tested[evidence.shown[0]] == 7
    assert evidence.genes == tuple(GENES)


def test_sparse_and_dense_are_the_same(real, table_and_evidence):
    table, _ = table_and_evidence
    thin, theirs = real.copy(), make_predicted()
    thin.X, theirs.X = sparse.csr_matrix(thin.X), sparse.csc_matrix(theirs.X)
    (found,) = evaluated(theirs, thin)
    for metric in ("pearson_delta", "l2"):
        np.testing.assert_allclose(found.row("tool").values[metric][0], table.row("tool").values[metric][0], rtol=1e-5)


def test_counts_are_logged_alike(tmp_path):
    """Real cells as their own prediction: no distance, in whatever space; paths as well as AnnData."""
    adata = tiny_perturbation.make_adata()
    adata.write_h5ad(tmp_path / "real.h5ad")
    pairs = adata[adata.obs.condition.isin(["g1+g0", "g0+z"])].copy()
    pairs.write_h5ad(tmp_path / "pairs.h5ad")
    (table,) = evaluate_files(
        {"copy": [tmp_path / "pairs.h5ad"]},
        tmp_path / "real.h5ad",
        spec=DataSpec(space="counts", perturbation="condition", covariates=("line",)),
        metrics={"l2": EXPRESSION_METRICS["l2"]},
    )
    assert table.row("copy").mean("l2") == 0
    assert 0.1 < table.row("control").mean("l2") < 50
    assert table.provenance["data"]["file"] == "real.h5ad"


def test_split_says_what_is_compared(real, tmp_path):
    """Predictions of what the split does not hold out are counted, and not compared."""
    populations, _ = SPEC.read_populations(real)
    rule = HoldOutConditions(conditions=("a+b",))
    save_split(tmp_path / "split.json", split_populations(rule, populations, SPEC.covariates))
    more = anndata.concat([make_predicted(), cells([("c", "K")] * 5, ("what", "where"), {})], index_unique="-")
    (table,) = evaluated(more, real, split=tmp_path / "split.json")
    assert table.provenance["predicted_and_not_used"]["tool"][0]["c (K)"] == 5
    assert table.provenance["split"]["training"] == "the training part of the split"
    assert table.provenance["split"]["train"] == [str(p) for p in sorted(populations) if p.condition != "a+b"]
    only = more[more.obs["where"] == "K"].copy()
    with pytest.raises(ValueError, match=r"predicted\['tool'\]\[0\] has no cells of a\+b \(L\), which the split holds"):
        evaluated(only, real, split=tmp_path / "split.json")


def test_a_column_marks_training_cells(real):
    """Without "c" the mean of perturbations is another; controls that nobody marks are controls all the same."""
    marked = real.copy()
    marked.obs["part"] = np.where(marked.obs.drug.isin(["a", "b"]), "train", "rest")
    (table,) = evaluated(make_predicted(), marked, training=("part", "train"))
    assert table.n_training == 2
    assert table.provenance["split"]["train"] == [f"{c} ({k})" for c in ("control", "a", "b") for k in "KL"]
    marked.obs.loc[marked.obs.index[marked.obs.drug == "a+b"][:1], "part"] = "train"
    with pytest.raises(ValueError, match=r"a\+b \(K\) is predicted, but some of its cells are marked"):
        evaluated(make_predicted(), marked, training=("part", "train"))
    with pytest.raises(ValueError, match=r"no cell of real has 'trian' in obs\['part'\]. Did you mean 'train'\?"):
        evaluated(make_predicted(), marked, training=("part", "trian"))


def with_values(adata, value):
    adata.X[3, 2] = value
    return adata


def without_training(adata):
    return adata[adata.obs.drug.isin(["DMSO", "a+b"])].copy()


def rounded(adata):
    adata.X = np.round(adata.X * 2)
    return adata


def replaced(spec=SPEC, **fields):
    return replace(spec, **fields)


def one_line():
    adata = make_predicted()
    return adata[adata.obs["where"] == "L"].copy()


def controls_alone():
    adata = make_predicted()
    return adata[adata.obs.what == "none"].copy()


@pytest.mark.parametrize(
    ("predicted", "options", "message"),
    [
        (lambda: make_predicted(genes=GENES[2:]), {}, r"2 of 8 genes \('g0', 'g1'\) of real are missing there, 0 of 6"),
        (lambda: with_values(make_predicted(), np.nan), {}, "holds 1 values that are NaN or infinite"),
        (lambda: with_values(make_predicted(), -0.5), {}, "holds 1 negative values, the least is -0.5"),
        (lambda: with_values(make_predicted(), 30), {}, r"goes up to 30, but space='lognormalised'"),
        (lambda: rounded(make_predicted()), {}, r"holds integers alone, up to \d, but space='lognormalised'"),
        (make_predicted, {"predicted_spec": None}, "'drug' is not one"),
        (make_predicted, {"spec": replaced(control="DMS")}, r"no cell of obs\['drug'\] is a control \('DMS'\)"),
        (make_predicted, {"predicted_spec": replaced(THEIRS, control="nine")}, r"real has no cells of none \(K\)"),
        (make_predicted, {"spec": replaced(space="latent")}, "perturbations are compared by expression"),
        (make_predicted, {"spec": replaced(space="counts")}, "predicted_spec must be of the kind and space of spec"),
        (make_predicted, {"spec": DataSpec(space="latent", batch="line")}, "spec must name perturbation or time"),
        (make_predicted, {"n_components": 3}, "n_components=3 is of time series"),
        (make_predicted, {"genes": "union"}, "genes must be one of 'same', 'shared'; got 'union'"),
        (make_predicted, {"allow": ("nans",)}, "allow must be one of 'nan', 'negative'; got 'nans'"),
        (make_predicted, {"split": "no.json", "training": ("part", "x")}, "give one of them"),
        (dict, {}, "predicted must name at least one model"),
        (lambda: {"tool": "file.h5ad"}, {}, "must be a list of files or AnnData, one a seed"),
        (lambda: {"a": [make_predicted()], "b": [one_line()]}, {}, r"predicted\['b'\]\[0\] has no cells of a\+b \(K\)"),
        (lambda: controls_alone(), {}, "holds control cells alone"),
    ],
)  # fmt: skip
def test_mistakes(real, predicted, options, message):
    with pytest.raises(ValueError, match=message):
        evaluated(predicted(), real, **options)


def test_mistakes_in_the_real_file(real):
    with pytest.raises(ValueError, match="no training perturbation is left for the baselines"):
        evaluated(make_predicted(), without_training(real))
    with pytest.raises(ValueError, match="holds 1 values that are NaN") as caught:
        evaluated(make_predicted(), with_values(real.copy(), np.nan))
    assert caught.value.__notes__ == ["In real."]
    with pytest.raises(ValueError, match="space='latent'|integers alone"):
        evaluated(make_predicted(), rounded(real.copy()))
    missing = real[~((real.obs.drug == "a+b") & (real.obs.line == "K"))].copy()
    with pytest.raises(ValueError, match=r"real has no cells of a\+b \(K\), which is to be compared. Did you mean"):
        evaluated(make_predicted(), missing)


def test_what_is_allowed_is_counted(real):
    (table,) = evaluated(with_values(make_predicted(), -0.5), real, allow=("negative",))
    assert np.isfinite(table.row("tool").mean("l2"))
    broken = make_predicted()
    at = int(np.flatnonzero(broken.obs.what == "b+a")[0])
    broken.X[at, 0] = np.inf
    keep = []
    (table,) = evaluated(broken, real, allow=("nan",), keep=keep)
    assert table.row("tool").n_failed("l2") == 1
    assert table.row("tool").n_nonfinite == 1
    assert [p.context for p in keep[0].predicted["tool"]] == ["K"]
    assert table.provenance["allowed"] == ["nan"]


def test_shared_genes_are_asked_for(real):
    (table,) = evaluated(make_predicted(genes=GENES[:1:-1]), real, genes="shared")
    assert table.n_genes == 6
    assert "2 genes that not all files have are left out" in table.title
    assert table.provenance["genes"] == {"choice": "shared", "n": 6, "left_out": 2}
    other = make_predicted()
    other.var_names = [f"ENSG{i}" for i in range(8)]
    with pytest.raises(ValueError, match="no gene is in all files: real has 'g0'"):
        evaluated(other, real, genes="shared")


def make_series(days, seed=0, width=3):
    rng = np.random.default_rng(seed)
    day = np.repeat(days, 12)
    latent = (day[:, None] * np.arange(1, width + 1) + rng.normal(size=(len(day), width))).astype(np.float32)
    obs = pd.DataFrame({"day": day}, index=[f"c{i}" for i in range(len(day))])
    return anndata.AnnData(obs=obs, obsm={"X_pca": latent})


def test_time_series_in_a_latent_space(tmp_path):
    real, keep = make_series([0.0, 1.0, 2.0, 4.0]), []
    predicted = make_series([2.0], seed=1)
    predicted.obsm["z"] = predicted.obsm.pop("X_pca")
    theirs = DataSpec(space="latent", expression="obsm/z", time="day")
    options = {"spec": DAYS, "predicted_spec": theirs, "metrics": SERIES, "n_draws": 2}
    (table,) = evaluate_files({"tool": [predicted]}, real, keep=keep, **options)
    assert table.title == (
        "predicted time 2, in all 3 features; baselines fitted on what real holds besides what is predicted: "
        "times 0, 1, 4"
    )
    assert table.row("tool").mean("W1") < table.row("linear interpolation").mean("W1") * 1.5
    assert table.row("tool").mean("W1") < table.row("nearest earlier time").mean("W1") / 2
    assert isinstance(keep[0], SeriesEvidence)
    assert (keep[0].earlier[0], keep[0].time, keep[0].are_genes) == (1.0, 2.0, False)
    both = make_series([1.0, 2.0], seed=1)
    assert len(evaluate_files({"tool": [both]}, real, spec=DAYS, metrics=SERIES, n_draws=1)) == 2
    save_split(tmp_path / "split.json", split_times(HoldOutTimes(times=(2.0,)), (0.0, 1.0, 2.0, 4.0)))
    (same,) = evaluate_files(
        {"tool": [both]}, real, spec=DAYS, metrics=SERIES, n_draws=1, split=tmp_path / "split.json"
    )
    assert same.provenance["split"]["train"] == [0.0, 1.0, 4.0]
    assert same.provenance["predicted_and_not_used"]["tool"] == [{"time 1": 12}]


def test_time_series_of_counts_by_components():
    adata = tiny_series.make_adata()
    adata = adata[adata.obs.day <= 2].copy()  # no rule has fewer cells than day 2, so that all of them are compared
    predicted = adata[adata.obs.day == 2].copy()
    spec = DataSpec(space="counts", time="day")
    options = {"spec": spec, "metrics": SERIES, "n_draws": 1}
    (table,) = evaluate_files({"copy": [predicted]}, adata, n_components=3, **options)
    assert table.row("copy").mean("W1") == pytest.approx(0, abs=1e-6)
    assert table.row("nearest earlier time").mean("W1") > 0.1
    assert "in 3 principal components" in table.title
    (whole,) = evaluate_files({"copy": [predicted]}, adata, **options)
    assert "in all 12 features" in whole.title


@pytest.mark.parametrize(
    ("days", "options", "message"),
    [
        ([0.0, 1.0, 2.0, 4.0], {}, r"no training time is left for the baselines: all times of real \(0, 1, 2, 4\)"),
        ([3.0], {}, "real has no cells of time 3, which is to be compared. Leave it out"),
        ([2.0], {"width": 2}, r"1 of 3 genes \('dimension 3'\) of real are missing there"),
    ],
)
def test_mistakes_in_time_series(days, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_files({"tool": [make_series(days, **options)]}, make_series([0.0, 1.0, 2.0, 4.0]), spec=DAYS)


@pytest.fixture(scope="module")
def here(tmp_path_factory, real, tiny_run, perturbation_run):
    folder = tmp_path_factory.mktemp("files")
    real.write_h5ad(folder / "real.h5ad")
    for seed in (1, 2):
        make_predicted(seed).write_h5ad(folder / f"tool{seed}.h5ad")
    tiny_series.make_adata().write_h5ad(folder / "series.h5ad")
    tiny_perturbation.make_adata().write_h5ad(folder / "screen.h5ad")
    (folder / "series_run").symlink_to(tiny_run.workdir)
    (folder / "screen_run").symlink_to(perturbation_run.workdir)
    return folder


COMMAND = ["evaluate", "--predicted", "mine=tool1.h5ad", "mine=tool2.h5ad", "--real", "real.h5ad"]
COMMAND += ["--perturbation", "drug", "--control", "DMSO", "--contexts", "line", "--space", "lognormalised"]
COMMAND += ["--predicted-spec", "perturbation=what", "--predicted-spec", "control=none"]
COMMAND += ["--predicted-spec", 'covariates=["where"]']


def test_command(here, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(here)
    main([*COMMAND, "--out", str(tmp_path / "report"), "--n-draws", "2"])
    told = capsys.readouterr().out
    assert "all 2 predicted populations, unseen: combination (2)" in told
    assert "l2: mine " in told
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"report.html", "results.json", "scores.csv", "metrics.csv", "tables.csv"}
    with open(tmp_path / "report" / "scores.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(r["row"], r["seed"], r["population"]) for r in rows if r["kind"] == "model"} == {
        ("mine", seed, p) for seed in "01" for p in ("a+b (K)", "a+b (L)")
    }
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert set(results) == {"environment", "hashes", "tables"}
    again = refused(capsys, *COMMAND, "--out", tmp_path / "report")
    assert "exists already and is not overwritten" in again
    main([*COMMAND, "--out", str(tmp_path / "numbers.json"), "--n-draws", "2"])
    assert json.loads((tmp_path / "numbers.json").read_text()) == results["tables"]


def test_commands_of_the_readme(monkeypatch, capsys, tmp_path):
    """As printed, on files with the names and columns that it tells."""
    monkeypatch.chdir(tmp_path)
    real = make_real()
    real.obs["condition"] = real.obs.pop("drug").astype(str).replace("DMSO", "ctrl")
    real.write_h5ad("real.h5ad")
    for seed, name in enumerate(("mine_seed0", "mine_seed1", "theirs")):
        made = make_predicted(seed)
        made.obs = made.obs.rename(columns={"what": "condition", "where": "line"})
        made[made.obs["condition"] != "none"].copy().write_h5ad(f"{name}.h5ad")
    make_series([0.0, 1.0, 2.0]).write_h5ad("series.h5ad")
    make_series([1.0], seed=1).write_h5ad("forecast.h5ad")
    guide = (Path(__file__).parents[2] / "GUIDE.md").read_text()
    (block,) = (b for b in re.findall(r"^```\n(.*?)^```", guide, flags=re.M | re.S) if "theirs=" in b)
    first, second = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines())
    for words, folder in ((first, "report"), (second, "times")):
        main([*words[1:], "--n-draws", "1"])
        assert (tmp_path / folder / "report.html").exists()
    told = capsys.readouterr().out
    assert "pearson_delta: mine " in told
    assert "W1: forecast " in told


@pytest.mark.parametrize(("run", "data"), [("series_run", "series.h5ad"), ("screen_run", "screen.h5ad")])
def test_report_of_runs(here, monkeypatch, capsys, tmp_path, run, data):
    """With the figures of cells, for both kinds of runs."""
    monkeypatch.chdir(here)
    main(["evaluate", "--runs", run, "--data", data, "--out", str(tmp_path / "report"), "--n-draws", "1"])
    assert "open" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.html").read_text()
    assert text.count("<img src=") > 6
    assert "Calibration" in text
    assert "Cells" in text


def test_command_where_names_are_joined_otherwise(here, monkeypatch, capsys, tmp_path):
    """The real file's names by another separator than the predicted ones'."""
    monkeypatch.chdir(here)
    real = anndata.read_h5ad("real.h5ad")
    real.obs["drug"] = [name.replace("+", "_") for name in real.obs["drug"].astype(str)]
    real.write_h5ad(tmp_path / "joined.h5ad")
    command = [str(tmp_path / "joined.h5ad") if word == "real.h5ad" else word for word in COMMAND]
    main([*COMMAND, "--n-draws", "2", "--out", str(tmp_path / "plain.json")])
    more = ["--separator", "_", "--predicted-spec", "separator=+", "--out", str(tmp_path / "joined.json")]
    main([*command, "--n-draws", "2", *more])
    plain, joined = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "joined"))
    assert [table["rows"] for table in plain] == [table["rows"] for table in joined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "give --runs with at least one folder, and --data"),
        (["evaluate", "--runs", "x", "--real", "real.h5ad"], "--real is of evaluations by --predicted"),
        ([*COMMAND, "--step", "3"], "--step is of evaluations by --runs; this one has --predicted"),
        (["evaluate", "--predicted", "tool1.h5ad"], "--predicted needs --real"),
        ([*COMMAND, "--predicted-spec", "what"], "--predicted-spec takes KEY=VALUE, such as perturbation=condition"),
        ([*COMMAND, "--predicted-spec", "perturbaton=x"], "Did you mean 'perturbation'?"),
        ([*COMMAND, "--training", "part"], "--training takes COLUMN=VALUE"),
        ([*COMMAND, "--out", "no/report"], "would lie in a folder that does not exist"),
        ([*COMMAND, "--control", "DMS"], "is a control ('DMS')"),
        (["evaluate", "--predicted", "toll1.h5ad", *COMMAND[4:]], "'toll1.h5ad' does not exist. Did you mean 'tool"),
    ],
)
def test_mistakes_in_the_command(here, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(here)
    assert message in refused(capsys, *arguments)
    assert not Path("report").exists()
