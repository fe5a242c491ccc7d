"""`train` and `evaluate` on perturbations: same seed, same run; test cells are not seen; nothing is overwritten."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pytest
from scipy import sparse
from test_experiment import assert_folder_of, assert_same_state, files_of, killed_and_resumed
from tiny_perturbation import EXPERIMENT, GENES, make_adata
from tiny_series import damaged_copy

from scjax import checkpoint
from scjax.config import from_dict, to_dict
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import PairedSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutSeenDoubles, LeaveOut
from scjax.experiment import PerturbationExperiment, evaluate, read_experiment, report_of, train
from scjax.experiment.perturbation import prepare, tables
from scjax.metrics.perturbation_report import DEFAULT_METRICS
from scjax.predict import GenerationConfig, load, predict
from scjax.types import Population

L2 = {"l2": DEFAULT_METRICS["l2"]}
TEST = tuple(Population(names, line) for names in (("g0", "g1"), ("g0", "z")) for line in ("A1", "B2"))


def test_folder_of_a_run(perturbation_run):
    assert_folder_of(perturbation_run, EXPERIMENT, "scdfm", {"flow", "mmd2"})
    assert perturbation_run.data.split.test == TEST
    about = checkpoint.read_about(perturbation_run.workdir / "checkpoints")
    assert about["model"]["n_tokens"] == 4 + len(GENES) + 1  # "z" is measured by none
    assert about["experiment"]["model"]["n_tokens"] is None


def test_resumed_run_equals_the_uninterrupted_one_and_test_cells_are_not_seen(perturbation_run, tmp_path):
    """Bit for bit, though the cells of the test populations are others here from the start."""
    adata = make_adata()
    rows = np.flatnonzero(adata.obs["condition"].isin(["g1+g0", "g0+z"]))
    adata.X[rows] = np.random.default_rng(1).poisson(50.0, (len(rows), adata.n_vars))
    resumed = killed_and_resumed(EXPERIMENT, adata, tmp_path / "run")
    assert_same_state(resumed.state, perturbation_run.state)


def test_resume_refuses_other_settings_other_data_and_another_kind(perturbation_run, tiny_run):
    before = files_of(perturbation_run.workdir)
    other = replace(EXPERIMENT, model=replace(EXPERIMENT.model, gamma=0.0))
    with pytest.raises(ValueError, match=r"other settings \(model.gamma: 0.5 there, 0.0 here\). Use them"):
        train(other, make_adata(), perturbation_run.workdir, resume=True)
    with pytest.raises(ValueError, match="other data than those of run .* trained on 139 cells"):
        train(EXPERIMENT, make_adata()[:-1].copy(), perturbation_run.workdir, resume=True)
    with pytest.raises(ValueError, match="holds a run of kind 'TimeSeriesExperiment', not 'PerturbationExperiment'"):
        train(EXPERIMENT, make_adata(), tiny_run.workdir, resume=True)
    with pytest.raises(ValueError, match=r"holds another run; nothing is overwritten.*resume=True"):
        train(EXPERIMENT, make_adata(), perturbation_run.workdir)
    assert files_of(perturbation_run.workdir) == before


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_checkpoint_offers_the_previous_one(perturbation_run, tmp_path, how):
    folder = damaged_copy(perturbation_run.workdir, tmp_path / "run", how)
    offered = r"is damaged: .* The previous complete one is step 10: pass step=10"
    for call in (lambda: load(folder), lambda: train(EXPERIMENT, make_adata(), folder, resume=True)):
        with pytest.raises(ValueError, match=offered):
            call()
    assert load(folder, 10).step == 10


def test_validation_keeps_the_best_parameters_and_stops_early(tmp_path):
    """The validation loss repeats itself where the parameters do; the best ones predict; test cells have no part."""
    experiment = replace(
        EXPERIMENT,
        model=replace(EXPERIMENT.model, fusion="perceiver", gamma=0.0, dropout=0.5),
        split=HoldOutSeenDoubles(validation_fraction=0.4),
        optimizer=replace(EXPERIMENT.optimizer, learning_rate=0.5),  # so that it gets worse
        n_steps=40,
        validate_every=5,
        patience=2,
    )
    run = train(experiment, make_adata(), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = min(scores, key=scores.__getitem__)
    assert int(run.state.best.step) == best
    assert int(run.state.step) == best + 10 < 40
    validate = prepare(experiment, make_adata()).validate
    assert float(validate(run.state.best.params)["loss"]) == pytest.approx(scores[best], rel=1e-5)
    found = load(tmp_path / "run")
    np.testing.assert_array_equal(found.params["time"]["mlp"]["Dense_0"]["kernel"], _kernel(run.state.best.params))
    assert not np.array_equal(_kernel(run.state.ema), _kernel(run.state.best.params))
    assert len(run.data.split.validation) == 2
    assert not set(run.data.split.validation) & {*run.data.split.train, *run.data.split.test}


def _kernel(params):
    return np.asarray(params["time"]["mlp"]["Dense_0"]["kernel"])


def change(adata, what):
    """One thing wrong with the data."""
    match what:
        case "misspelt column":
            adata.obs = adata.obs.rename(columns={"condition": "conditions"})
        case "misspelt covariate":
            adata.obs = adata.obs.rename(columns={"line": "lines"})
        case "no control":
            adata = adata[adata.obs["condition"] != "ctrl"].copy()
        case "no control in a context":
            adata = adata[(adata.obs["condition"] != "ctrl") | (adata.obs["line"] == "A1")].copy()
        case "missing condition":
            adata.obs.loc[adata.obs_names[3], "condition"] = np.nan
        case "twice":
            adata.obs["condition"] = adata.obs["condition"].replace({"g1+ctrl": "g1+g1"})
        case "NaN" | "inf" | "negative" | "fraction":
            adata.X = adata.X.astype(np.float32)
            adata.X[3, 4] = {"NaN": np.nan, "inf": np.inf, "negative": -2.0, "fraction": 0.5}[what]
        case "no double":
            adata = adata[~adata.obs["condition"].isin(["g1+g0", "g0+z"])].copy()
    return adata


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("misspelt column", r"'condition' is not one. Did you mean 'conditions'\?"),
        ("misspelt covariate", r"'line' is not one. Did you mean 'lines'\?"),
        ("no control", "control"),
        ("no control in a context", "B2"),
        ("missing condition", "1 of 139 cells|1 cells have no value"),
        ("twice", "'g1' twice"),
        ("NaN", "'X' holds 1 values that are NaN or infinite, the first is nan"),
        ("inf", "'X' holds 1 values that are NaN or infinite, the first is inf"),
        ("negative", "'X' holds 1 negative values, the least is -2; counts are not negative"),
        ("fraction", "1 values that are not integers"),
        ("no double", "holds out none of"),
    ],
)
def test_bad_data_end_before_anything_is_written(tmp_path, what, message):
    with pytest.raises(ValueError, match=message):
        train(EXPERIMENT, change(make_adata(), what), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"checkpoint_every": 7}, "checkpoint_every must be a multiple of scan_steps; got 7 and 5"),
        ({"spec": DataSpec(space="counts", time="day")}, "spec.perturbation must name the obs column"),
        ({"spec": DataSpec(space="latent", perturbation="condition")}, "scDFM generates expression"),
        ({"preprocess": Preprocess()}, "preprocess must leave expression as it is.* got scale=True, n_components=50"),
        (
            {"preprocess": Preprocess(library_size=None, log1p=False, scale=False, n_components=None)},
            "spec.space='counts', but .* set library_size='all_genes' and log1p=True; got preprocess.library_size=None",
        ),
        ({"generation": GenerationConfig(guidance=2.0)}, "guidance=2.0 needs model.condition_dropout above 0"),
        (
            {"split": HoldOutSeenDoubles(validation_fraction=0.2)},
            "keeps populations from training; set validate_every=50",
        ),
        ({"validate_every": 5}, "the split keeps no population for that: set split.validation_fraction"),
        ({"patience": 5}, "patience=5 needs validate_every"),
        (
            {"split": HoldOutSeenDoubles(validation_fraction=0.2), "validate_every": 7},
            "validate_every must be a multiple of scan_steps; got 7 and 5",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(EXPERIMENT, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"n_tokens": 5}}, "model.n_tokens must be the data's 15, or None, which takes it; got 5"),
        ({"model": {"perturbation": "vector"}}, "needs external vectors; name them in spec.vectors"),
        ({"sampling": {"n_genes": 11}}, "n_genes must be at most the 10 genes of the data; got 11"),
    ],
)
def test_settings_that_do_not_fit_the_data(tmp_path, fields, message):
    parts = {name: replace(getattr(EXPERIMENT, name), **values) for name, values in fields.items()}
    with pytest.raises(ValueError, match=message):
        train(replace(EXPERIMENT, **parts), make_adata(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_experiment_file(tmp_path):
    """The kind of a settings file is told by the file; an unknown one is an error with a suggestion."""
    assert from_dict(PerturbationExperiment, to_dict(EXPERIMENT)) == EXPERIMENT
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(to_dict(EXPERIMENT)))
    assert read_experiment(path) == EXPERIMENT
    path.write_text(json.dumps({**to_dict(EXPERIMENT), "kind": "PerturbationExperment"}))
    with pytest.raises(ValueError, match=r"settings.json: kind must be .* got 'PerturbationExperment'. Did you mean"):
        read_experiment(path)


# -- evaluate


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    """Another seed, and another split, shortly."""
    folder = tmp_path_factory.mktemp("more")
    line = replace(EXPERIMENT, split=LeaveOut(covariate="line", value="B2"), n_steps=5, checkpoint_every=5)
    train(replace(EXPERIMENT, seed=1), make_adata(), folder / "seed1")
    train(line, make_adata(), folder / "line")
    return folder


def test_table_has_models_baselines_and_ceiling(perturbation_run, more_runs):
    (table,) = evaluate([perturbation_run.workdir, more_runs / "seed1"], make_adata())
    assert table.populations == TEST
    assert "unseen: combination (4); predicted from the 39 control cells of their contexts" in table.title
    kinds = {row.name: row.kind for row in table.rows}
    assert kinds["scDFM"] == "model"
    assert {"control", "mean of perturbations", "additive", "nearest", "ridge"} <= {
        name for name, kind in kinds.items() if kind == "baseline"
    }
    assert table.rows[-1].kind == "floor"
    assert table.provenance["steps"] == {"scDFM": [20, 20]}
    assert table.provenance["generation"]["scDFM"][0] == to_dict(EXPERIMENT.generation)
    assert len(table.row("scDFM").values["l2"]) == 2
    assert table.row("scDFM").sd_seeds("l2") > 0
    report = report_of(table)
    assert json.loads(json.dumps(report.to_json_dict(table)))["title"] == table.title
    assert "additive" in report.render(table)


def test_table_of_a_left_out_line(more_runs):
    found = evaluate([more_runs / "line"], make_adata(), metrics=L2, n_draws=2)
    assert [len(t.populations) for t in found] == [5]
    assert "unseen: context (5)" in found[0].title
    assert {p.context for p in found[0].populations} == {"B2"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"scDFM": ["run"], "line": ["line"]}, r"differ in their split .* Evaluate them one"),
        (["line"], "the runs of one row may differ in their seed only; those of 'scDFM' differ in split"),
        (["run"], r"the runs of 'scDFM' have the seeds \[0, 0\]"),
    ],
)
def test_runs_that_share_no_table(perturbation_run, more_runs, names, message):
    if isinstance(names, list):
        names = {"scDFM": ["run", *names]}
    places = {"run": perturbation_run.workdir}
    runs = {row: [places.get(name, more_runs / name) for name in of_row] for row, of_row in names.items()}
    with pytest.raises(ValueError, match=message):
        evaluate(runs, make_adata())


def test_nothing_held_out(perturbation_trained):
    blind = perturbation_trained._replace(split=replace(perturbation_trained.split, test=()))
    with pytest.raises(ValueError, match="the runs held out nothing, so there is nothing to evaluate"):
        tables({"scDFM": [blind]}, make_adata(), provenance={})


def test_predictions_that_are_there_already_are_not_made_again(perturbation_run, monkeypatch):
    """The table is the same; others' predictions are rows as well."""
    adata, trained = make_adata(), load(perturbation_run.workdir)
    made = predict(trained, adata, ["g1+g0", "z+g0", "g0"])
    others = anndata.AnnData(sparse.csr_matrix(made.X[:, ::-1]), made.obs[["condition", "context"]], made.var[::-1])
    (plain,) = evaluate([perturbation_run.workdir], adata, metrics=L2)
    monkeypatch.setattr("scjax.predict.perturbation.generate", None)
    given = {"scDFM": [made], "another": [others]}
    (table,) = evaluate([perturbation_run.workdir], adata, predicted=given, metrics=L2)
    for name in given:
        np.testing.assert_allclose(table.row(name).values["l2"], plain.row("scDFM").values["l2"], rtol=1e-6)
    assert table.provenance["generation"] == {"scDFM": [to_dict(EXPERIMENT.generation)], "another": [None]}
    assert json.dumps(report_of(table).to_json_dict(table)["provenance"])


def test_predictions_that_make_no_row(perturbation_run, perturbation_trained):
    adata = make_adata()
    made = predict(perturbation_trained, adata, ["g1+g0", "z+g0"])

    def check(message, predicted, row="another"):
        with pytest.raises(ValueError, match=message):
            evaluate([perturbation_run.workdir], adata, predicted={row: predicted}, metrics=L2)

    check(r"predicted has no cells of g0\+g1 \(B2\)", [made[made.obs["context"] == "A1"]])
    check("predicted must have the 10 genes of the model; 1 are missing, the first is 'g0'", [made[:, 1:]])
    check("'condition' is not one", [anndata.AnnData(made.X, made.obs[["context"]], made.var)])
    unnamed = anndata.AnnData(made.X, made.obs, made.var)
    check(r"predicted\['scDFM'\] must be what the runs .* got predictions of None", [unnamed], row="scDFM")
    check("got predictions of none", [], row="scDFM")


def test_runs_of_two_kinds_share_no_table(perturbation_run, tiny_run):
    with pytest.raises(ValueError, match="are of kinds 'scimf' and 'scdfm'; they cannot share a table"):
        evaluate({"a": [perturbation_run.workdir], "b": [tiny_run.workdir]}, make_adata())


@pytest.mark.parametrize("what", ["one count", "a gene's name", "a condition", "a covariate", "the order of the cells"])
def test_evaluate_refuses_other_data(perturbation_run, what):
    adata = make_adata()
    match what:
        case "one count":
            adata.X[0, 0] += 1
        case "a gene's name":
            adata.var_names = ["other", *adata.var_names[1:]]
        case "a condition" | "a covariate":
            column = {"a condition": "condition", "a covariate": "line"}[what]
            values = list(adata.obs[column])
            values[0] = next(v for v in values if v != values[0])
            adata.obs[column] = values
        case _:
            adata = adata[::-1].copy()
    with pytest.raises(ValueError, match="evaluate: these are other data than those of run"):
        evaluate([perturbation_run.workdir], adata)


def test_a_plain_sampling_has_the_genes_of_the_data(perturbation_run):
    """None takes all genes, in their order."""
    task = prepare(replace(EXPERIMENT, sampling=PairedSampling(n_cells=4, n_genes=None)), make_adata())
    batch = task.batches(0)
    assert batch.source.shape == (1, 4, len(GENES))
    np.testing.assert_array_equal(batch.genes, task.data.vocabulary.gene_tokens(GENES))
