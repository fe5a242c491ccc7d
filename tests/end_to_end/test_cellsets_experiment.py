"""`train` and `evaluate` on cell sets: resumption, finetuning by names, validation, several sources, bad input."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_experiment import assert_folder_of, assert_same_state
from tiny_cellsets import EXPERIMENT, GENES, MODEL, make_adata

from scjax import checkpoint
from scjax.config import to_dict
from scjax.data.preprocess import Preprocess
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutContexts, HoldOutNone, LeaveOut
from scjax.experiment import Pretrained, evaluate, read_experiment, report_of, train
from scjax.experiment.cellsets import prepare
from scjax.metrics.perturbation_report import DEFAULT_METRICS
from scjax.predict import SetGenerationConfig, load, predict
from scjax.types import Population

L2 = {"l2": DEFAULT_METRICS["l2"]}
TEST = tuple(Population(("A",), f"{kind} | d3") for kind in ("NK", "T"))


def test_folder_of_a_run(cellset_run):
    assert_folder_of(cellset_run, EXPERIMENT, "perturbdiff", ("denoising", "energy_distance"))
    assert cellset_run.data.split.test == TEST
    about = checkpoint.read_about(cellset_run.workdir / "checkpoints")
    sizes = ("n_genes", "n_perturbations", "n_cell_types", "n_batches", "n_doses", "n_spaces")
    assert [about["model"][name] for name in sizes] == [8, 3, 2, 3, None, 1]
    assert about["experiment"]["model"]["n_genes"] is None
    assert about["trained"] == {"perturbation": ["A", "B"], "cell_type": ["NK", "T"], "batch": ["d1", "d2", "d3"]}


def test_resumed_run_equals_the_uninterrupted_one(cellset_run, tmp_path):
    """Bit for bit, from the checkpoint of step 10."""
    shutil.copytree(cellset_run.workdir, tmp_path / "run")
    resumed = train(EXPERIMENT, make_adata(), tmp_path / "run", resume=True, step=10)
    assert_same_state(resumed.state, cellset_run.state)


def test_test_cells_are_not_seen(cellset_run):
    """The same batches, genes and totals, though the cells of the test populations are others."""
    adata = make_adata()
    rows = np.flatnonzero((adata.obs["drug"] == "A") & (adata.obs["donor"] == "d3"))
    adata.X[rows] = np.random.default_rng(1).poisson(50.0, (len(rows), adata.n_vars))
    one, other = (prepare(EXPERIMENT, data) for data in (make_adata(), adata))
    for step in (0, 7, 100):
        jax.tree.map(np.testing.assert_array_equal, one.batches(step), other.batches(step))
    assert not np.array_equal(one.data.x[rows], other.data.x[rows])


# -- finetuning

OTHER_GENES = (*GENES[:1:-1], "new")  # in another order, without g0 and g1
OTHERS = {"genes": OTHER_GENES, "types": ("T", "B"), "donors": ("d3", "d9")}


def finetuned(run, **fields):
    """Settings under which no step changes anything, so that the final parameters are those of the start."""
    return replace(
        EXPERIMENT,
        pretrained=Pretrained(run=str(run), **fields),
        split=HoldOutNone(),
        optimizer=replace(EXPERIMENT.optimizer, learning_rate=1e-30),
        ema_decay=None,
        n_steps=5,
        checkpoint_every=5,
    )


def assert_unchanged(a, b):
    """But for steps of 1e-30, which show where there was a zero."""
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-25)


def test_finetuning_keeps_the_rows_of_shared_names(cellset_run, cellset_trained, tmp_path, capsys):
    run = train(finetuned(cellset_run.workdir), make_adata(**OTHERS), tmp_path / "run")
    old, new = cellset_trained.params, run.state.params
    entries = {role: (old["covariates"][role]["embedding"], new["covariates"][role]["embedding"]) for role in _ROLES}
    before, after = entries["cell_type"]  # (NK, T) and (B, T)
    assert_unchanged(after[1], before[1])
    assert not np.isin(after[0], before).any()
    before, after = entries["batch"]  # (d1, d2, d3) and (d3, d9)
    assert_unchanged(after[0], before[2])
    assert not np.isin(after[1], before).any()
    assert not np.isin(entries["perturbation"][1], entries["perturbation"][0]).any()
    for name in ("state", "previous", "control"):
        assert_unchanged(new["inputs"][name][:, :6], old["inputs"][name][:, :1:-1])
        assert not np.isin(new["inputs"][name][:, 6], old["inputs"][name]).any()
    jax.tree.map(assert_unchanged, new["layer_0"], old["layer_0"])
    assert_unchanged(new["head"]["modulation"]["kernel"], 0)
    assert new["head"]["output"]["kernel"].shape == (16, 7)

    told = capsys.readouterr().err
    assert "covariates.cell_type.embedding" in told
    assert "kept: 1 of 2 rows, by name; 1 fresh" in told
    assert "rows of each gene: 6 kept (g7, g6, g5, g4, g3, ...), 1 fresh (new), 2 left behind (g0, g1)" in told
    found = load(run.workdir)
    about = found.about["pretrained"]
    assert (about["run"], about["step"]) == (cellset_trained.about["run"], 20)
    assert about["rows"]["batch"] == {"kept": ["d3"], "fresh": ["d9"], "left_behind": ["d1", "d2"]}
    assert found.config.covariate_width == 8  # genes of the pretrained run
    assert len(about["arrays"]) == len(jax.tree.leaves(new))


_ROLES = ("perturbation", "cell_type", "batch")


def test_finetuning_with_new_genes_and_fresh_parts(cellset_run, cellset_trained):
    """No name in common: only with a word."""
    others = make_adata(genes=("n0", "n1", "n2"), types=("X", "Y"))
    settings = finetuned(cellset_run.workdir, new_genes=True, fresh=("cell_type",))
    new, old = prepare(settings, others).start(jax.random.key(3)), cellset_trained.params
    assert new["inputs"]["state"].shape == (1, 3, 16)
    assert not np.isin(new["covariates"]["cell_type"]["embedding"], old["covariates"]["cell_type"]["embedding"]).any()
    np.testing.assert_array_equal(new["covariates"]["batch"]["embedding"], old["covariates"]["batch"]["embedding"])
    np.testing.assert_array_equal(new["inputs"]["gene"], old["inputs"]["gene"])
    for fields, message in (
        ({"new_genes": True}, "no cell_type of these data .X, Y. is one of the pretrained model's .NK, T."),
        (
            {"fresh": ("cell_type",)},
            "no gene of these data .* set pretrained.new_genes=True: all are then drawn afresh",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(finetuned(cellset_run.workdir, **fields), others)


def test_finetuning_refuses(cellset_run, tiny_run, tmp_path):
    adata = make_adata()
    for fields, message in (
        ({"run": str(tmp_path / "none")}, r"pretrained.run=.*none'"),
        ({"run": str(tiny_run.workdir)}, "must be a run of PerturbDiff; it is one of scimf"),
        ({"run": str(cellset_run.workdir), "step": 7}, "step must be one of 10, 20"),
        ({"run": str(cellset_run.workdir), "space": "pbmc"}, "pretrained.space must be one of ''; got 'pbmc'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(replace(EXPERIMENT, pretrained=Pretrained(**fields)), adata)
    wide = replace(finetuned(cellset_run.workdir), model=replace(MODEL, d_model=32))
    with pytest.raises(ValueError, match="the pretrained parameters do not fit the new model"):
        prepare(wide, adata)
    with pytest.raises(ValueError, match="pretrained.fresh must be one of .*; got 'batches'. Did you mean 'batch'"):
        Pretrained(run="somewhere", fresh=("batches",))
    with pytest.raises(ValueError, match="pretrained.run must name the folder of a run; got ''"):
        Pretrained(run="")


# -- several sources

MARGINAL = replace(
    EXPERIMENT,
    model=replace(MODEL, perturbation="none", n_spaces=2, control_dropout=1.0),
    spec=DataSpec(space="counts", cell_type="kind", batch="donor", covariates=("kind", "donor")),
    split=HoldOutNone(),
    absent="zero",
    sampling=replace(EXPERIMENT.sampling, controls="zeros"),
    n_steps=5,
    checkpoint_every=5,
    ema_decay=None,
)


def test_pretraining_on_two_sources_and_finetuning_on_one(tmp_path):
    """The projection and the batches are those of the source that is named."""
    sources = [("blood", make_adata(genes=GENES[:6])), ("liver", make_adata(genes=GENES[2:]))]
    train(MARGINAL, sources, tmp_path / "run")
    found = load(tmp_path / "run")
    assert found.names.sources == ("blood", "liver")
    assert found.names.batch[0] == "blood_d1"
    np.testing.assert_array_equal(found.measured.sum(axis=1), 6)
    settings = finetuned(tmp_path / "run", space="liver")
    task = prepare(settings, make_adata(genes=GENES[2:]))
    new, old = task.start(jax.random.key(0)), found.params
    np.testing.assert_array_equal(new["inputs"]["state"], old["inputs"]["state"][1:, 2:])
    np.testing.assert_array_equal(new["covariates"]["batch"]["embedding"], old["covariates"]["batch"]["embedding"][3:])
    assert task.about["pretrained"]["rows"]["batch"]["left_behind"] == ["blood_d1", "blood_d2", "blood_d3"]
    with pytest.raises(ValueError, match="space must say which of the 2 input projections"):
        prepare(finetuned(tmp_path / "run", fresh=("batch",)), make_adata(genes=GENES[2:]))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate([tmp_path / "run"], sources)
    with pytest.raises(ValueError, match="other data than those of run"):
        evaluate([tmp_path / "run"], sources[::-1])
    # It saw no controls, so that it generates from none, in the gene space of the source that is named.
    made = predict(found, sources[1:], ["control"], contexts=["T | liver_d1"], n_cells=3)
    assert (made.n_obs, tuple(made.var_names)) == (3, GENES[2:])
    with pytest.raises(ValueError, match="no controls that would tell which of the sources 'blood', 'liver'"):
        predict(found, sources, ["control"])


def test_input_projections_are_shared_or_one_a_source():
    sources = [("blood", make_adata()), ("liver", make_adata())]
    experiment = replace(EXPERIMENT, split=HoldOutNone())
    shared = prepare(experiment, sources)
    assert shared.batches(0).space is None
    own = prepare(replace(experiment, model=replace(MODEL, n_spaces=2)), sources)
    assert own.batches(0).space.shape == (2,)
    with pytest.raises(ValueError, match="model.n_spaces must be 1, one input projection for all, or 2"):
        prepare(replace(experiment, model=replace(MODEL, n_spaces=3)), sources)


# -- validation

WITH_VALIDATION = replace(EXPERIMENT, split=replace(EXPERIMENT.split, validation_conditions=("B",)), validate_every=10)


def test_validation_shows_the_condition_and_throws_no_coin(cellset_trained):
    """The same number each time, whatever training hides; another for a condition that says something else."""
    hiding = replace(MODEL, condition_dropout=0.9, self_conditioning=1.0, control_dropout=0.7)
    scores = []
    for model in (MODEL, hiding):
        task = prepare(replace(WITH_VALIDATION, model=model), make_adata())
        for _ in range(2):
            found = task.validate(cellset_trained.params)
            scores.append({name: float(score) for name, score in found.items()})
    assert list(scores[0]) == ["loss", "denoising", "energy_distance"]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-6)
    params = jax.tree.map(lambda leaf: leaf, cellset_trained.params)
    params["covariates"]["perturbation"] = {"embedding": params["covariates"]["perturbation"]["embedding"] + 1}
    assert float(task.validate(params)["loss"]) != pytest.approx(scores[0]["loss"], rel=1e-6)
    assert task.split.validation == tuple(Population(("B",), f"{kind} | d3") for kind in ("NK", "T"))


# -- bad input


def change(adata, what):
    """One thing wrong with the data."""
    match what:
        case "misspelt column":
            adata.obs = adata.obs.rename(columns={"drug": "drugs"})
        case "misspelt batch":
            adata.obs = adata.obs.rename(columns={"donor": "donors"})
        case "no control":
            adata = adata[adata.obs["drug"] != "ctrl"].copy()
        case "missing":
            adata.obs.loc[adata.obs_names[3], "drug"] = np.nan
        case "fraction":
            adata.X = adata.X.astype(np.float32)
            adata.X[3, 4] = 0.5
        case "not held out":
            adata = adata[adata.obs["donor"] != "d3"].copy()
    return adata


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("misspelt column", r"'drug' is not one. Did you mean 'drugs'\?"),
        ("misspelt batch", r"'donor' is not one. Did you mean 'donors'\?"),
        ("no control", "control"),
        ("missing", "1 of 108 cells"),
        ("fraction", "1 values that are not integers"),
        ("not held out", "d3"),
    ],
)
def test_bad_data_end_before_anything_is_written(tmp_path, what, message):
    with pytest.raises(ValueError, match=message):
        train(EXPERIMENT, change(make_adata(), what), tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(EXPERIMENT, [("one", change(make_adata(), what))], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def with_(part, **fields):
    return {part: replace(getattr(EXPERIMENT, part), **fields)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"ema_every": 0}, "ema_every must be at least 1; got 0"),
        ({"ema_decay": None, "ema_every": 10}, "ema_every=10 and ema_start='initial' are of a moving average"),
        ({"control_seed": -1}, "control_seed must be at least 0; got -1"),
        (with_("spec", space="latent"), "spec.space='latent', but PerturbDiff generates expression"),
        ({"preprocess": Preprocess()}, "preprocess must leave expression as it is.* got scale=True, n_components=50"),
        (
            {"preprocess": Preprocess(library_size=None, log1p=False, scale=False, n_components=None)},
            "spec.space='counts', but .* set library_size='all_genes' and log1p=True; got preprocess.library_size=None",
        ),
        (with_("spec", perturbation=None), "model.perturbation='table' needs spec.perturbation"),
        (with_("spec", batch=None), "model.batch='table' needs spec.batch"),
        (with_("model", cell_type="vector"), "model.cell_type='vector' needs external vectors; name them in spec.cell"),
        (with_("model", n_doses=4), "model.n_doses=4 needs spec.dose"),
        (with_("model", condition_dropout=0.0), "guidance=2.0 needs model.condition_dropout above 0"),
        (with_("generation", n_steps=31), "generation.n_steps must be at most model.n_times=30; got 31"),
        (with_("split", validation_conditions=("B",)), r"split.validation_conditions=\('B',\) keeps populations"),
        ({"validate_every": 5}, "the split keeps no population for that"),
        ({"patience": 5}, "patience=5 needs validate_every"),
    ],
)
def test_settings_that_do_not_fit_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(EXPERIMENT, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (with_("model", n_genes=9), "model.n_genes must be the data's 8, or None, which takes it; got 9"),
        (with_("model", n_batches=2), "model.n_batches must be the data's 3 or more, or None"),
        (with_("sampling", n_sets=50), "n_sets must be at most"),
        ({"unmatched": "error", "split": LeaveOut(covariate="donor", value="d9")}, "d9"),
    ],
)
def test_settings_that_do_not_fit_the_data(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(replace(EXPERIMENT, **fields), make_adata(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_experiment_file(tmp_path):
    """With a pretrained run, too."""
    for experiment in (EXPERIMENT, finetuned("runs/pretrained", space="pbmc", fresh=("batch",))):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(to_dict(experiment)))
        assert read_experiment(path) == experiment


# -- evaluate


def test_table_has_model_baselines_and_ceiling(cellset_run):
    (table,) = evaluate([cellset_run.workdir], make_adata(), metrics=L2)
    assert table.populations == TEST
    assert "unseen: pair (2); predicted from the 14 control cells of their contexts, which training saw" in table.title
    assert table.row("PerturbDiff").kind == "model"
    assert {"baseline", "floor"} <= {row.kind for row in table.rows}
    assert table.provenance["generation"]["PerturbDiff"] == [to_dict(EXPERIMENT.generation)]
    assert np.isfinite(table.row("PerturbDiff").mean("l2"))
    assert "PerturbDiff" in report_of(table).render(table)


def test_table_of_contexts_whose_controls_training_did_not_see(tmp_path):
    experiment = replace(
        EXPERIMENT,
        model=replace(MODEL, batch="none"),  # of a donor that training never saw nothing is learned
        split=HoldOutContexts(covariates=("donor",), values=(("d3",),)),
        generation=SetGenerationConfig(n_cells=4, n_steps=1, guidance=1.0),
        n_steps=5,
        checkpoint_every=5,
    )
    train(experiment, make_adata(), tmp_path / "run")
    (table,) = evaluate([tmp_path / "run"], make_adata(), metrics=L2)
    assert len(table.populations) == 4
    assert "14 control cells of their contexts, which training did not see" in table.title
