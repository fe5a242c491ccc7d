"""`train` and `evaluate` on real AnnData: same seed, same run; held-out cells are not seen; nothing is overwritten."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_series import EXPERIMENT, SIZES, damaged_copy, make_adata

from scjax import checkpoint
from scjax.data.preprocess import Preprocess
from scjax.data.splits import HoldOutLast, HoldOutNone, load_split
from scjax.experiment import TimeSeriesExperiment, evaluate, read_experiment, train
from scjax.experiment.timeseries import _features
from scjax.metrics.population import POPULATION_METRICS
from scjax.predict import load
from scjax.train.hooks import Hook
from scjax.train.optimizers import OptimizerConfig

W1 = {"W1": POPULATION_METRICS["W1"]}


def with_model(**fields) -> TimeSeriesExperiment:
    return replace(EXPERIMENT, model=replace(EXPERIMENT.model, **fields))


def assert_same_state(a, b):
    """Bit for bit, keys included."""
    a, b = (s._replace(key=jax.random.key_data(s.key)) for s in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def files_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    """Not an Exception: nothing between the hook and the test may swallow it."""


class KillAt(Hook):
    """Ends the run at the log entry of a step, as a kill would: without a last checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_log(self, step, metrics):
        if step == self.step:
            raise Killed


def killed_and_resumed(experiment, adata, folder):
    """The run that was killed after its step 16 and continued from its checkpoint of step 10."""
    with pytest.raises(Killed):
        train(experiment, adata, folder, hooks=[KillAt(16)])
    assert checkpoint.list_steps(folder / "checkpoints") == (10,)
    return train(experiment, adata, folder, resume=True)


def assert_folder_of(run, experiment, kind, terms):
    """What `train` wrote: files, settings, split, checkpoints, a line each fourth of 20 steps with these terms."""
    folder = run.workdir
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "experiment.json", "metrics.jsonl", "split.json"]
    assert read_experiment(folder) == experiment
    assert load_split(folder / "split.json") == run.data.split
    assert checkpoint.list_steps(folder / "checkpoints") == (10, 20)
    assert checkpoint.read_about(folder / "checkpoints")["kind"] == kind
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    assert {"loss", "grad_norm", *terms} <= set(lines[0])


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    """Another seed, a model without interactions, and one of another split, all short."""
    folder = tmp_path_factory.mktemp("more")
    settings = {
        "seed1": replace(EXPERIMENT, seed=1),
        "alone": with_model(n_blocks=0),
        "forecast": replace(with_model(n_blocks=0), split=HoldOutLast(n_times=1), n_steps=5),
        "all": replace(with_model(n_blocks=0), split=HoldOutNone(), n_steps=5),
    }
    for name, experiment in settings.items():
        train(experiment, make_adata(), folder / name)
    return folder


def test_folder_of_a_run(tiny_run):
    assert_folder_of(tiny_run, EXPERIMENT, "scimf", {"sinkhorn", "kinetic_energy"})
    assert tiny_run.data.split.train == (0.0, 1.0, 4.0)
    assert int(tiny_run.state.step) == 20


def test_same_seed_same_run_and_cells_of_the_held_out_time_are_not_seen(tiny_run, more_runs, tmp_path):
    """The same bytes come out when every cell of the held-out time is replaced by others."""
    adata = make_adata()
    rows = np.flatnonzero(adata.obs["day"] == 2.0)
    adata.X[rows] = np.random.default_rng(1).poisson(50.0, (len(rows), adata.n_vars))
    again = train(EXPERIMENT, adata, tmp_path / "run")
    assert_same_state(again.state, tiny_run.state)
    first, other = (jax.tree.leaves(load(folder).params)[0] for folder in (tiny_run.workdir, more_runs / "seed1"))
    assert not np.array_equal(first, other)


def test_resumed_run_equals_the_uninterrupted_one(tiny_run, tmp_path):
    folder = tmp_path / "run"
    resumed = killed_and_resumed(EXPERIMENT, make_adata(), folder)
    assert_same_state(resumed.state, tiny_run.state)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (tiny_run.workdir / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds": 0, "waited": 0}
    assert [line | times for line in lines] == [line | times for line in wanted]
    assert_same_state(train(EXPERIMENT, make_adata(), folder, resume=True).state, tiny_run.state)  # nothing left to do


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_checkpoint_offers_the_previous_one_which_works(tiny_run, tmp_path, how):
    folder = damaged_copy(tiny_run.workdir, tmp_path / "run", how)
    before = files_of(folder)
    offered = r"is damaged: .* The previous complete one is step 10: pass step=10"
    with pytest.raises(ValueError, match=offered):
        load(folder)
    with pytest.raises(ValueError, match=offered):
        evaluate([folder], make_adata())
    with pytest.raises(ValueError, match=offered):
        train(EXPERIMENT, make_adata(), folder, resume=True)
    assert files_of(folder) == before
    assert load(folder, 10).step == 10


def test_resume_from_before_a_damaged_checkpoint(tiny_run, tmp_path):
    """It takes the damaged one's place, which is kept under another name."""
    folder = damaged_copy(tiny_run.workdir, tmp_path / "run", "flipped")
    resumed = train(EXPERIMENT, make_adata(), folder, resume=True, step=10)
    assert_same_state(resumed.state, tiny_run.state)
    assert load(folder).step == 20
    assert [p.name for p in (folder / "checkpoints").glob("superseded*")] == ["superseded-20-1"]


def test_resume_refuses_other_settings_and_other_data(tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, folder)
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"other settings \(model.sigma: 0.1 there, 0.2 here\). Use them"):
        train(with_model(sigma=0.2), make_adata(), folder, resume=True)
    with pytest.raises(ValueError, match=r"split.kind: 'HoldOutTimes' there, 'HoldOutNone' here"):
        train(replace(EXPERIMENT, split=HoldOutNone()), make_adata(), folder, resume=True)
    with pytest.raises(ValueError, match="other data than those of run .* trained on 46 cells"):
        train(EXPERIMENT, make_adata()[:-1].copy(), folder, resume=True)
    with pytest.raises(ValueError, match="step must be one of 10, 20 .* got 15"):
        train(EXPERIMENT, make_adata(), folder, resume=True, step=15)
    assert files_of(folder) == before


def test_folder_with_anything_in_it_is_left_alone(tiny_run, tmp_path):
    before = files_of(tiny_run.workdir)
    with pytest.raises(ValueError, match=r"holds another run; nothing is overwritten.*resume=True"):
        train(EXPERIMENT, make_adata(), tiny_run.workdir)
    assert files_of(tiny_run.workdir) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files; nothing is overwritten. Choose a new folder.$"):
        train(EXPERIMENT, make_adata(), tmp_path)
    with pytest.raises(ValueError, match=r"workdir must be a folder; .*notes.txt is a file"):
        train(EXPERIMENT, make_adata(), tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="holds no run. Start it in a new folder"):
        train(EXPERIMENT, make_adata(), tmp_path, resume=True)
    with pytest.raises(ValueError, match="step=10 says where to resume from; it needs resume=True"):
        train(EXPERIMENT, make_adata(), tmp_path / "new", step=10)
    shutil.copy(tiny_run.workdir / "experiment.json", tmp_path)
    with pytest.raises(ValueError, match="step=10, but the run in .* ended before its first checkpoint. Leave step"):
        train(EXPERIMENT, make_adata(), tmp_path, resume=True, step=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["experiment.json", "notes.txt"]


def change(adata, what):
    """One thing wrong with the data."""
    match what:
        case "misspelt column":
            adata.obs = adata.obs.rename(columns={"day": "days"})
        case "one time":
            adata = adata[adata.obs["day"] == 0.0].copy()
        case "one cell at a time":
            adata = adata[~adata.obs_names.isin(adata.obs_names[adata.obs["day"] == 4.0][1:])].copy()
        case "NaN" | "inf" | "negative":
            adata.X = adata.X.astype(np.float32)
            adata.X[3, 4] = {"NaN": np.nan, "inf": np.inf, "negative": -2.0}[what]
        case "no such time":
            adata = adata[adata.obs["day"] != 2.0].copy()
    return adata


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("misspelt column", r"time names a column of adata.obs; 'day' is not one. Did you mean 'days'\?"),
        ("one time", r"at least two times are needed; obs\['day'\] has 1 \(all at 0.0\)"),
        ("one cell at a time", r"each time needs at least 2 cells; 4.0 of obs\['day'\] has one"),
        ("NaN", "'X' holds 1 values that are NaN or infinite, the first is nan"),
        ("inf", "'X' holds 1 values that are NaN or infinite, the first is inf"),
        ("negative", "'X' holds 1 negative values, the least is -2; counts are not negative"),
        ("no such time", "HoldOutTimes: 2.0 is not a time of the data, which are 0.0, 1.0, 4.0"),
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
        ({"log_every": 0}, "log_every must be at least 1; got 0"),
        ({"checkpoint_every": 7}, "checkpoint_every must be a multiple of scan_steps; got 7 and 5"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1; got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\); got 1.0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"optimizer": OptimizerConfig(accumulate=3)}, "accumulate must divide n_steps"),
        ({"optimizer": OptimizerConfig(n_warmup=20)}, "n_warmup must be less than the number of updates, 20; got 20"),
        ({"preprocess": Preprocess(n_components=4)}, r"model.n_dims=3, but .* 4 dimensions .*Set model.n_dims=4"),
        ({"preprocess": Preprocess(n_top_genes=5, n_components=None)}, r"but the cells have 5 dimensions"),
    ],
)
def test_settings_that_do_not_fit_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(EXPERIMENT, **fields)


def test_width_that_only_the_data_tell(tmp_path):
    """Without a PCA or a number of genes the width is the data's, and is compared before training."""
    with pytest.raises(ValueError, match=r"model.n_dims=3, but the cells have 12 dimensions"):
        train(replace(EXPERIMENT, preprocess=Preprocess(n_components=None)), make_adata(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- evaluate


def test_table_has_models_baselines_and_floor(tiny_run, more_runs):
    runs = {"scIMF": [tiny_run.workdir, more_runs / "seed1"], "without interactions": [more_runs / "alone"]}
    (table,) = evaluate(runs, make_adata())
    kinds = {row.name: (row.kind, len(row.comparisons)) for row in table.rows}
    assert kinds == {
        "scIMF": ("model", 2),
        "without interactions": ("model", 1),
        "nearest earlier time": ("baseline", 1),
        "nearest later time": ("baseline", 1),
        "linear interpolation": ("baseline", 1),
        "OT interpolation": ("baseline", 1),
        "real vs real (floor)": ("floor", 1),
    }
    assert table.title == "held-out time 2, trained on times 0, 1, 4"
    assert table.n_cells == min(SIZES.values())
    assert table.provenance["steps"] == {"scIMF": [20, 20], "without interactions": [20]}
    assert all(np.isfinite(row.mean(metric)) for row in table.rows for metric in POPULATION_METRICS)
    values = {row.name: row.mean("W1") for row in table.of_kind("model")}
    assert values["scIMF"] != values["without interactions"]


def test_table_of_a_forecast(more_runs):
    (table,) = evaluate([more_runs / "forecast"], make_adata(), metrics=W1, n_draws=2)
    assert table.row("scIMF").mean("W1") > 0
    assert "no training time after 4" in table.row("OT interpolation").note


def test_figures_have_the_names_of_components_or_of_genes(tiny_run):
    """Genes where the model moves them as they are; only unscaled ones are expression, with its zeros."""
    keep = []
    evaluate([tiny_run.workdir], make_adata(), metrics=W1, n_draws=1, keep=keep)
    assert (keep[0].features, keep[0].are_genes) == (("PC 1", "PC 2", "PC 3"), False)
    trained = load(tiny_run.workdir)
    steps = replace(trained.transform, components=None, explained_variance=None)
    steps = replace(steps, mean=np.zeros_like(steps.mean), std=np.ones_like(steps.std))
    for change, are_genes in (({}, True), ({"std": 2 * steps.std}, False), ({"space": "latent"}, False)):
        found = _features(trained._replace(transform=replace(steps, **change)))
        assert found == (list(steps.feature_names), are_genes)


def test_table_does_not_depend_on_how_the_counts_are_stored(tiny_run):
    from scipy import sparse

    adata = make_adata()
    adata.X = sparse.csc_matrix(adata.X.astype(np.float64))
    (a,), (b,) = (evaluate([tiny_run.workdir], x, metrics=W1, n_draws=2) for x in (make_adata(), adata))
    assert [row.mean("W1") for row in a.rows] == [row.mean("W1") for row in b.rows]


def test_earlier_step_is_evaluated_on_request(tiny_run):
    (late,), (early,) = (evaluate([tiny_run.workdir], make_adata(), metrics=W1, step=step) for step in (None, 10))
    assert early.provenance["steps"] == {"scIMF": [10]}
    assert early.row("scIMF").mean("W1") != late.row("scIMF").mean("W1")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["alone"], "the runs of one row may differ in their seed only; those of 'scIMF' differ in model.n_blocks"),
        (["again"], r"the runs of 'scIMF' have the seeds \[0, 0\]; the same training counts once"),
        ({"scIMF": ["run"], "forecast": ["forecast"]}, r"runs \w+ and \w+ differ in their split .* Evaluate them one"),
        ({"everything": ["all"]}, "the runs held out no time, so there is nothing to evaluate"),
        ({"none": []}, r"workdirs must be a list of run folders, or lists by name; got \[\] for 'none'"),
        ({"typo": ["runn"]}, "there is no folder .*runn"),
    ],
)
def test_runs_that_share_no_table(tiny_run, more_runs, names, message):
    places = {"run": tiny_run.workdir, "again": tiny_run.workdir}
    if isinstance(names, list):
        names = {"scIMF": ["run", *names]}
    runs = {row: [places.get(name, more_runs / name) for name in of_row] for row, of_row in names.items()}
    with pytest.raises(ValueError, match=message):
        evaluate(runs, make_adata())


def test_evaluate_refuses_one_folder_in_place_of_a_list(tiny_run):
    with pytest.raises(ValueError, match="workdirs must be a list of run folders"):
        evaluate(str(tiny_run.workdir), make_adata())


@pytest.mark.parametrize("what", ["one count", "a gene's name", "a time", "the order of the cells"])
def test_evaluate_refuses_other_data(tiny_run, what):
    adata = make_adata()
    match what:
        case "one count":
            adata.X[0, 0] += 1
        case "a gene's name":
            adata.var_names = ["other", *adata.var_names[1:]]
        case "a time":
            adata.obs["day"] = adata.obs["day"].replace({4.0: 5.0})
        case _:
            adata = adata[::-1].copy()
    with pytest.raises(ValueError, match="evaluate: these are other data than those of run"):
        evaluate([tiny_run.workdir], adata)


def test_reading_settings_of_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"is not the folder of a run: it holds no experiment.json"):
        read_experiment(tmp_path)
