"""Runs that differ in their seed as one predictor of means, with intervals that populations kept back calibrate."""

import json
from dataclasses import replace

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cellsets
import tiny_perturbation
import tiny_series

from scjax.cli import main
from scjax.data.splits import HoldOutCrossed
from scjax.experiment import train, train_seeds
from scjax.experiment.uncertainty import predict_intervals
from scjax.metrics.conformal import calibrate
from scjax.models import scdfm
from scjax.predict import observed_cells, predict
from scjax.predict.ensemble import load_members, observed_means, populations_of, predict_means, stacked
from scjax.types import Population

SEEDS = (0, 1, 2)
LINES = tiny_perturbation.LINES
EXPERIMENT = replace(tiny_perturbation.EXPERIMENT, n_steps=6)
CALIBRATED = HoldOutCrossed(
    covariates=("line",), values=((LINES[0],),), conditions=("g0+g1",), validation_conditions=("g0+z",)
)
HELD = [Population(("g0", "g1"), line) for line in LINES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("members") / f"seed{seed}" for seed in SEEDS]
    assert not train_seeds(EXPERIMENT, tiny_perturbation.make_adata(), folders, SEEDS).failed
    return folders


@pytest.fixture(scope="module")
def members(folders):
    return load_members(folders)


@pytest.fixture(scope="module")
def adata():
    return tiny_perturbation.make_adata()


@pytest.fixture(scope="module")
def means(members, adata):
    return predict_means(members, adata, ["g1+g0", "z"], seed=3)


def test_means_are_those_of_each_members_cells(members, adata, means):
    """Mean over cells and members, their standard deviation and ends, row by row."""
    cells = [predict(member, adata, ["g1+g0", "z"], seed=3) for member in members]
    assert list(means.obs["condition"]) == ["g0+g1", "g0+g1", "z", "z"]
    assert list(means.obs["context"]) == [*LINES, *LINES]
    assert set(means.obs["n_cells"]) == {10}
    assert tuple(means.var_names) == tiny_perturbation.GENES
    for i, (condition, context) in enumerate(zip(means.obs["condition"], means.obs["context"], strict=True)):
        of = np.stack(
            [made.X[(made.obs["condition"] == condition) & (made.obs["context"] == context)].mean(0) for made in cells]
        )
        np.testing.assert_allclose(means.X[i], of.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(means.layers["sd"][i], of.std(axis=0, ddof=1), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(means.layers["lowest"][i], of.min(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(means.layers["highest"][i], of.max(axis=0), rtol=1e-5, atol=1e-6)
    assert means.layers["sd"].max() > 1e-3
    told = means.uns["scjax"]
    assert json.loads(told["runs"]) == [member.about["run"] for member in members]
    assert json.loads(told["steps"]) == [6, 6, 6]
    assert "run" not in told


def test_one_member_has_no_spread(members, adata, means):
    alone = predict_means(members[:1], adata, ["g1+g0", "z"], seed=3)
    assert not alone.layers
    assert alone.shape == means.shape
    np.testing.assert_array_equal(alone.obs, means.obs)


def test_stacked_parameters_under_vmap(members):
    """One program samples with all runs; each member's cells are those of its own parameters."""
    first = members[0]
    x = jnp.asarray(np.random.default_rng(0).exponential(size=(4, 10)), jnp.float32)
    ids = jnp.asarray(first.vocabulary.encode([("g0", "g1")] * 4, "gene", 2))
    tokens = jnp.asarray(first.vocabulary.gene_tokens(first.genes))

    def cells(params):
        bound = {"constants": first.constants, "config": first.config, "n_steps": 2}
        return scdfm.sample(params, x, ids, tokens, jax.random.key(0), **bound)

    together = jax.jit(jax.vmap(cells))(stacked(members))
    one = jax.jit(cells)
    for made, member in zip(together, members, strict=True):
        np.testing.assert_allclose(made, one(member.params), rtol=1e-4, atol=1e-4)


def test_observed_means_are_in_the_same_space(members, adata, means):
    found = observed_means(members, adata, means)
    cells = observed_cells(members[0], adata, [HELD[0]])[HELD[0]]
    np.testing.assert_allclose(found[0], cells.mean(axis=0), rtol=1e-5)
    assert populations_of(members, means)[0] == HELD[0]
    some = predict_means(members[:1], adata, ["z"], seed=3, genes=["g7", "g2"])
    np.testing.assert_allclose(observed_means(members, adata, some), found[2:][:, [7, 2]], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"simultaneous": True}, {"by_spread": True}])
def test_intervals_are_those_of_the_populations_kept_back(members, adata, options):
    """The radius of the two held-out pairs, around the prediction of another combination."""
    made = predict_intervals(members, adata, ["g1+z"], calibration=HELD, level=0.6, seed=3, **options)
    kept = predict_means(members, adata, ["g0+g1"], seed=3)
    scale = [kept.layers["sd"].clip(1e-3), made.layers["sd"].clip(1e-3)] if options.get("by_spread") else [None, None]
    radius = calibrate(
        kept.X,
        observed_means(members, adata, kept),
        0.6,
        simultaneous=bool(options.get("simultaneous")),
        scale=scale[0],
    )
    low, high = radius.around(made.X, scale[1])
    np.testing.assert_allclose(made.layers["low"], low, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(made.layers["high"], high, rtol=1e-3, atol=1e-4)
    assert np.isfinite(made.layers["low"]).all()
    told = json.loads(made.uns["scjax"]["conformal"])
    assert told["calibration"] == [str(p) for p in HELD]
    assert (told["level"], told["note"]) == (0.6, "")


def test_too_few_populations_leave_intervals_open_and_say_so(members, adata):
    made = predict_intervals(members[:1], adata, ["g1+z"], calibration=HELD, seed=3)
    assert np.isinf(made.layers["low"]).all()
    assert json.loads(made.uns["scjax"]["conformal"])["note"] == ("2 conditions, fewer than the 9 that level 0.9 takes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": [Population(("z",), "A1")]}, r"must not hold what training saw, whose errors .*: z \(A1\)"),
        ({"calibration": HELD, "conditions": ["g1+g0"]}, r"calibration and conditions must differ; g0\+g1 \(A1\)"),
        ({}, "the split kept none for validation"),
        ({"calibration": HELD, "floor": 0.0}, "floor must be a positive"),
        ({"calibration": HELD, "by_spread": True}, "give more runs"),
    ],
)
def test_bad_calibration_is_named(members, adata, changes, message):
    with pytest.raises(ValueError, match=message):
        predict_intervals(members[:1], adata, **{"conditions": ["g1+z"], "seed": 3, **changes})


def test_what_calibrates_and_cannot_be_predicted_is_told(members, adata):
    """Of a perturbation that nobody asked for: unknown to the model, or known (a gene) and never observed."""
    for name, message in (("nothing", "'nothing' is not known"), ("g9", "adata has no cells of g9")):
        wrong = Population((name,), LINES[0])
        with pytest.raises(ValueError, match=message) as caught:
            predict_intervals(members, adata, ["g1+z"], calibration=[wrong])
        assert caught.value.__notes__ == [f"While looking at the populations that calibrate the intervals: {wrong}."]


def test_members_are_of_one_experiment(folders, tmp_path, perturbation_run):
    with pytest.raises(ValueError, match="seed0 is .*seed0 once more"):
        load_members([folders[0], folders[1], folders[0]])
    with pytest.raises(ValueError, match="has another settings than"):
        load_members([folders[0], perturbation_run.workdir])
    with pytest.raises(ValueError, match="number of runs must be at least 1"):
        load_members([])


@pytest.mark.parametrize("kind", ["cellsets", "series"])
def test_every_kind_of_model(kind, request):
    """Cell sets as flows; a time series has a row a time, and no populations."""
    tiny, fixture, wanted, column = {
        "cellsets": (tiny_cellsets, "cellset_trained", ["A"], "context"),
        "series": (tiny_series, "trained", [1.0, 2.0], "day"),
    }[kind]
    one, adata = request.getfixturevalue(fixture), tiny.make_adata()
    members = [one, one._replace(params=jax.tree.map(lambda leaf: 1.1 * leaf, one.params))]
    made = predict_means(members, adata, wanted, seed=3)
    cells = [predict(member, adata, wanted, seed=3) for member in members]
    for i, value in enumerate(made.obs[column]):
        of = [each.X[(each.obs[column] == value).to_numpy()].mean(axis=0) for each in cells]
        np.testing.assert_allclose(made.X[i], np.mean(of, axis=0), rtol=1e-4, atol=1e-4)
    assert made.layers["sd"].max() > 1e-3
    if kind == "series":
        with pytest.raises(ValueError, match="the rows of a time series are times"):
            populations_of(members, made)
        with pytest.raises(ValueError, match="a time series has no conditions to calibrate on"):
            predict_intervals(members, adata, ["A"])
    else:
        assert np.isfinite(observed_means(members, adata, made)).all()


def test_command(folders, adata, means, tmp_path, capsys):
    """Means of three runs; and of one with intervals that so few populations kept for validation make infinite."""
    adata.write_h5ad(tmp_path / "cells.h5ad")
    one, *others = map(str, folders)
    command = ["predict", "--run", one, "--data", str(tmp_path / "cells.h5ad"), "--conditions", "g1+g0", "z"]
    command += ["--seed", "3"]
    main([*command, "--ensemble", *others, "--out", str(tmp_path / "means.h5ad")])
    assert "4 means x 10 genes over 3 runs" in capsys.readouterr().out
    written = anndata.read_h5ad(tmp_path / "means.h5ad")
    np.testing.assert_allclose(written.X, means.X, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(written.layers["sd"], means.layers["sd"], rtol=1e-4, atol=1e-6)
    main(["show", str(tmp_path / "means.h5ad")])
    told = capsys.readouterr().out
    assert all(f"run {load_members([run])[0].about['run']}, step 6" in told for run in folders)
    kept = replace(EXPERIMENT, split=CALIBRATED, validate_every=5)
    train(kept, adata, tmp_path / "kept")
    command[2] = str(tmp_path / "kept")
    main([*command, "--interval", "0.9", "--out", str(tmp_path / "intervals.h5ad")])
    assert "the intervals are infinite:" in capsys.readouterr().out
    assert np.isinf(anndata.read_h5ad(tmp_path / "intervals.h5ad").layers["high"]).all()
    main([*command, "--interval", "0.5", "--out", str(tmp_path / "half.zarr")])
    half = anndata.read_zarr(tmp_path / "half.zarr")
    assert json.loads(half.uns["scjax"]["conformal"])["level"] == 0.5
    capsys.readouterr()
    main(["show", str(tmp_path / "half.zarr")])
    assert "  intervals of level 0.5, calibrated on g0+z (" in capsys.readouterr().out
    assert (half.layers["low"] < half.layers["high"]).all()
    with pytest.raises(SystemExit):
        main([*command, "--interval", "90", "--out", str(tmp_path / "no.h5ad")])
    assert "level must lie in" in capsys.readouterr().err
    for wrong in (["--step", "6"], ["--observed", str(tmp_path / "real.h5ad")]):
        with pytest.raises(SystemExit):
            main([*command, "--interval", "0.9", "--out", str(tmp_path / "no.h5ad"), *wrong])
        assert f"{wrong[0]} does nothing with --ensemble or --interval" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no.h5ad").exists()


def test_command_on_a_time_series(tmp_path, capsys):
    """A row a time."""
    adata, runs = tiny_series.make_adata(), [tmp_path / f"seed{seed}" for seed in (0, 1)]
    assert not train_seeds(replace(tiny_series.EXPERIMENT, n_steps=4), adata, runs, (0, 1)).failed
    adata.write_h5ad(tmp_path / "cells.h5ad")
    command = ["predict", "--run", str(runs[0]), "--data", str(tmp_path / "cells.h5ad"), "--times", "1", "2.5"]
    main([*command, "--n-cells", "9", "--ensemble", str(runs[1]), "--out", str(tmp_path / "means.h5ad")])
    assert "2 means x" in capsys.readouterr().out
    written, members = anndata.read_h5ad(tmp_path / "means.h5ad"), load_members(runs)
    assert list(written.obs["day"]) == [1.0, 2.5]
    assert (written.obs["n_cells"] == 9).all()
    each = [predict(member, adata, [1.0, 2.5], n_cells=9) for member in members]
    wanted = [np.mean([one.X[one.obs["day"] == t].mean(axis=0) for one in each], axis=0) for t in (1.0, 2.5)]
    np.testing.assert_allclose(written.X, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit):
        main([*command, "--interval", "0.9", "--out", str(tmp_path / "no.h5ad")])
    assert "--interval is not of this run" in capsys.readouterr().err
