"""Seeds trained together: each leaves the folder of an ordinary run with the result that it has alone."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_cellsets
import tiny_perturbation
import tiny_series
from test_experiment import KillAt, Killed, assert_folder_of

import scjax.experiment
from scjax import checkpoint
from scjax.experiment import SeedRuns, evaluate, timeseries, train, train_seeds
from scjax.metrics.population import POPULATION_METRICS
from scjax.predict import load
from scjax.train.loop import NonFiniteError

W1 = {"W1": POPULATION_METRICS["W1"]}
TERMS = {"scimf": {"sinkhorn"}, "scdfm": {"flow", "mmd2"}, "perturbdiff": {"denoising"}}
KINDS = {
    "scimf": (tiny_series, "tiny_run"),
    "scdfm": (tiny_perturbation, "perturbation_run"),
    "perturbdiff": (tiny_cellsets, "cellset_run"),
}


def assert_close(one, other):
    """Adam divides by the root of a moment, so that rounding in a tiny gradient is a part of the step of 0.01."""
    one, other = (s._replace(key=jax.random.key_data(s.key)) for s in (one, other))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), one, other)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Seeds 0 and 1 of the series."""
    folder = tmp_path_factory.mktemp("group")
    folders = [folder / f"seed{seed}" for seed in (0, 1)]
    return train_seeds(tiny_series.EXPERIMENT, tiny_series.make_adata(), folders, (0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_among_others_is_the_run_alone(kind, request, tmp_path):
    """Of all kinds of experiment; its folder is read as any other."""
    tiny, alone = KINDS[kind][0], request.getfixturevalue(KINDS[kind][1])
    if kind == "scimf":
        done = request.getfixturevalue("group")
    else:
        done = train_seeds(tiny.EXPERIMENT, tiny.make_adata(), [tmp_path / "seed0", tmp_path / "seed7"], (0, 7))
    assert not done.failed
    run, other = done.runs
    assert_close(run.state, alone.state)
    assert_folder_of(run, tiny.EXPERIMENT, kind, TERMS[kind])
    assert load(run.workdir).about["run"] == load(alone.workdir).about["run"]
    first, second = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(r.state.params)]) for r in (run, other))
    assert np.abs(first - second).max() > 1e-2


def test_runs_of_a_group_share_a_row(group):
    table = evaluate([run.workdir for run in group.runs], tiny_series.make_adata(), metrics=W1, n_draws=2)[0]
    assert len(table.rows[0].comparisons) == 2
    assert table.rows[0].sd_seeds("W1") > 0


def test_killed_and_resumed_together_and_alone(group, tmp_path):
    folders, adata = [tmp_path / "a", tmp_path / "b"], tiny_series.make_adata()
    with pytest.raises(Killed):
        train_seeds(tiny_series.EXPERIMENT, adata, folders, (0, 1), hooks=[KillAt(16)])
    assert [checkpoint.list_steps(folder / "checkpoints") for folder in folders] == [(10,), (10,)]
    train(replace(tiny_series.EXPERIMENT, seed=1), adata, folders[1], resume=True)
    done = train_seeds(tiny_series.EXPERIMENT, adata, folders, (0, 1), resume=True)
    for run, wanted in zip(done.runs, group.runs, strict=True):
        assert_close(run.state, wanted.state)
        lines = [json.loads(line)["step"] for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
        assert lines == [4, 8, 12, 16, 20]


def test_groups_that_had_not_begun_begin_when_the_others_are_resumed(group, tmp_path, capsys):
    folders, adata = [tmp_path / "a", tmp_path / "b"], tiny_series.make_adata()
    with pytest.raises(Killed):
        train_seeds(tiny_series.EXPERIMENT, adata, folders, (0, 1), together=1, hooks=[KillAt(16)])
    assert not folders[1].exists()
    done = train_seeds(tiny_series.EXPERIMENT, adata, folders, (0, 1), together=1, resume=True)
    assert f"{folders[1]} holds no run yet; its seed begins" in capsys.readouterr().err
    for run, wanted in zip(done.runs, group.runs, strict=True):
        assert_close(run.state, wanted.state)


@pytest.fixture
def spoiled(monkeypatch):
    """Seed 1 meets a NaN in batch 12."""
    make = timeseries.make_batches

    def make_spoiled(data, sampling, seed, *more):
        batch_at = make(data, sampling, seed, *more)

        def at(step):
            batch = batch_at(step)
            return replace(batch, x0=batch.x0 * np.float32("nan")) if seed == 1 and step == 12 else batch

        return at

    monkeypatch.setattr(timeseries, "make_batches", make_spoiled)


def test_a_seed_that_is_not_finite_leaves_a_record_and_the_others(group, spoiled, tmp_path, capsys):
    folders, adata = [tmp_path / "a", tmp_path / "b"], tiny_series.make_adata()
    done = train_seeds(tiny_series.EXPERIMENT, adata, folders, (0, 1))
    assert list(done.failed) == [1]
    assert_close(done.runs[0].state, group.runs[0].state)
    assert int(done.runs[1].state.step) == 12
    assert checkpoint.list_steps(folders[1] / "checkpoints") == (10,)
    told = json.loads((folders[1] / "failed.json").read_text())
    assert told["step"] == 12
    assert told["metrics"]["loss"] == "nan"
    assert str(folders[1]) in told["message"]
    assert not (folders[0] / "failed.json").exists()
    assert capsys.readouterr().err.count("seed 1 stopped") == 1
    with pytest.raises(NonFiniteError):
        train(replace(tiny_series.EXPERIMENT, seed=1), adata, folders[1], resume=True)
    assert json.loads((folders[1] / "failed.json").read_text())["step"] == 12


def test_smaller_groups_one_after_another(group, monkeypatch, tmp_path):
    """Five seeds, two at a time: what each group is asked for, and what comes back."""
    groups = []

    def recorded(experiment, adata, workdirs, seeds, digest, prepare, *, resume, hooks):
        groups.append((tuple(seeds), tuple(folder.name for folder in workdirs)))
        runs = tuple(group.runs[0]._replace(workdir=folder) for folder in workdirs)
        return SeedRuns(runs, {3: NonFiniteError.__new__(NonFiniteError)} if 3 in seeds else {})

    monkeypatch.setattr(scjax.experiment, "train_tasks", recorded)
    folders = [tmp_path / name for name in "abcde"]
    done = train_seeds(tiny_series.EXPERIMENT, tiny_series.make_adata(), folders, (0, 1, 2, 3, 9), together=2)
    assert groups == [((0, 1), ("a", "b")), ((2, 3), ("c", "d")), ((9,), ("e",))]
    assert [run.workdir for run in done.runs] == folders
    assert list(done.failed) == [3]


def test_bad_groups_are_refused_before_anything_is_written(group, tmp_path):
    adata, settings = tiny_series.make_adata(), tiny_series.EXPERIMENT
    a, b = tmp_path / "a", tmp_path / "b"
    for folders, seeds, more, message in (
        ([a, b], (1, 1), {}, "seeds must differ"),
        ([a], (0, 1), {}, "workdirs must hold a folder for each of the 2 seeds"),
        ([a, a], (0, 1), {}, "workdirs must differ"),
        ([a, b], (0, -1), {}, "each of seeds must be at least 0"),
        ([], (), {}, "the number of seeds must be at least 1"),
        ([a, b], (0, 1), {"together": 0}, "together must be at least 1"),
        ([a, group.runs[1].workdir], (0, 1), {}, "nothing is overwritten"),
        ([a, b], (0, 1), {"resume": True}, "holds no run"),
        ([run.workdir for run in group.runs], (1, 0), {"resume": True}, "holds a run of other settings"),
    ):
        with pytest.raises(ValueError, match=message):
            train_seeds(settings, adata, folders, seeds, **more)
    assert not a.exists()
