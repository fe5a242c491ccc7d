"""The presets of PerturbDiff: they say what they are, and run on files with the columns that they name."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

from scjax import presets
from scjax.cli import main
from scjax.config import to_dict
from scjax.experiment import cellsets, read_experiment, train

NAMES = [name for name in presets.names() if name.startswith("perturbdiff/")]
PUBLISHED = [
    f"perturbdiff/{data}_{kind}" for data in ("pbmc", "tahoe100m", "replogle") for kind in ("scratch", "finetune")
]
CONTEXTS = {  # cell types, batches: those that are held out, and one that is not
    "pbmc": (("B", "T"), ("Donor1", "Donor2", "Donor4", "Donor9", "Donor12")),
    "tahoe100m": (("CVCL_1097", "CVCL_1285", "CVCL_1098", "CVCL_0334", "CVCL_0480", "other"), ("plate1",)),
    "replogle": (("hepg2", "k562"), (1, 2)),
}
GENES = [f"g{i}" for i in range(6)]


def cells_of(data, spec):
    """Three cells of each perturbation in each context, and every vector that the spec asks for."""
    types, batches = CONTEXTS[data]
    rows = [(p, c, b) for p in (spec.control, "P1", "P2") for c in types for b in batches for _ in range(3)]
    obs = pd.DataFrame(rows, columns=[spec.perturbation, spec.cell_type, spec.batch])
    obs.index = [f"{data}{i}" for i in range(len(rows))]
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(len(rows), 6)).astype(np.float32)
    adata = anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=GENES))
    adata.obsm["X_hvg"] = pd.DataFrame(x[:, :4], index=obs.index, columns=GENES[:4])
    vectors = lambda names: {name: np.random.default_rng(list(name.encode())).normal(size=3) for name in names}  # noqa: E731
    every_type = sorted({c for types, _ in CONTEXTS.values() for c in types})
    adata.uns["cell_type_vectors"] = vectors(every_type)
    if spec.vectors is not None:
        adata.uns[spec.vectors] = vectors(["P1", "P2"])
    return adata


def tiny(experiment):
    return replace(
        experiment,
        model=replace(experiment.model, d_model=8, n_layers=1, n_heads=2, d_covariate=4, n_times=30),
        sampling=replace(experiment.sampling, n_sets=2, n_cells=4),
        generation=replace(experiment.generation, n_cells=4, n_steps=2),
        optimizer=replace(experiment.optimizer, n_warmup=1),
        n_steps=4,
        scan_steps=2,
        checkpoint_every=4,
        log_every=2,
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The pretraining on four tiny sources, the last without perturbations."""
    experiment = presets.preset("perturbdiff/pretrain").experiment
    files = []
    for data in CONTEXTS:
        spec = presets.preset(f"perturbdiff/{data}_scratch").experiment.spec
        adata = cells_of(data, spec)
        columns = {spec.perturbation: "perturbation", spec.cell_type: "cell_type", spec.batch: "batch"}
        adata.obs = adata.obs.rename(columns=columns)
        files.append((data, adata))
    atlas = files[0][1].copy()
    atlas.obs["perturbation"], atlas.obs["batch"] = "control", "someone"
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    train(tiny(experiment), [*files, ("cellxgene", atlas)], folder)
    return folder


def test_each_data_set_has_its_three():
    of_data = {f"perturbdiff/{d}_{k}" for d in CONTEXTS for k in ("scratch", "pretrain", "finetune")}
    assert of_data | {"perturbdiff/pretrain", "perturbdiff/kang", "perturbdiff/mcfaline"} == set(NAMES)
    for data in CONTEXTS:  # one run serves them all
        one = presets.preset(f"perturbdiff/{data}_pretrain")
        assert one.experiment == presets.preset("perturbdiff/pretrain").experiment
        assert f"{data}_finetune" in one.summary


@pytest.mark.parametrize("name", NAMES)
def test_presets_name_what_a_user_wants_to_know(name, tmp_path, capsys):
    found = presets.preset(name)
    assert f"--preset {name} " in found.command
    (tmp_path / "settings.json").write_text(json.dumps(to_dict(found.experiment)))
    assert read_experiment(tmp_path / "settings.json") == found.experiment
    main(["show", name])
    told = capsys.readouterr().out
    assert f"expected: {found.expected}" in told
    if name.endswith("finetune"):
        assert "a run of perturbdiff/pretrain that must be there" in told


@pytest.mark.parametrize("name", [*PUBLISHED, "perturbdiff/pretrain"])
def test_settings_of_the_code(name):
    """The table "Defaults at a glance" of the public code."""
    e = presets.preset(name).experiment
    assert (e.model.d_model, e.model.n_layers, e.model.n_heads, e.model.n_times) == (512, 8, 8, 1000)
    assert (e.model.condition_dropout, e.model.self_conditioning, e.model.divisor) == (0.5, 0.5, 10)
    assert e.model.control_dropout == (1 if "pretrain" in name else 0)
    assert (e.model.drop_per, e.model.mask_filler, e.model.covariate_width) == ("batch", False, "genes")
    assert e.optimizer.learning_rate == (2e-3 if "replogle" in name else 2e-4)
    assert (e.optimizer.weight_decay, e.optimizer.decayed, e.optimizer.clip_norm) == (0.01, "all_but_biases", 1.0)
    assert (e.ema_decay, e.ema_every, e.ema_start, e.n_steps) == (0.99, 10, "first_step", 200_000)
    assert e.sampling.n_cells == (32 if "replogle" in name else 256)
    assert (e.generation.n_steps, e.generation.spacing, e.generation.guidance) == (100, "truncated", 2.0)
    assert (e.model.perturbation, e.model.cell_type, e.model.batch) == (
        "none" if "pretrain" in name else "vector" if "replogle" in name else "table",
        "vector",
        "table",
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_fit_data_of_their_columns(name, pretrained):
    """On a tiny file: what is held out, and what finetuning keeps."""
    data, _, kind = name.partition("/")[2].partition("_")
    experiment = tiny(presets.preset(name).experiment)
    if kind == "finetune":
        experiment = replace(experiment, pretrained=replace(experiment.pretrained, run=str(pretrained)))
    adata = cells_of(data, experiment.spec)
    task = cellsets.prepare(experiment, [(data, adata)] if data == "tahoe100m" else adata)
    held_out = {value for (value,) in experiment.split.values}
    assert {p.condition for p in task.split.test} == {"P1", "P2"}
    assert all(held_out & set(p.context.split(" | ")) for p in task.split.test)
    assert not any(held_out & set(p.context.split(" | ")) for p in task.split.train if not p.is_control)
    assert task.data.transform.n_dims == (6 if experiment.spec.expression == "X" else 4)
    if kind == "finetune":
        found = task.about["pretrained"]
        became = {name: action for name, _, action in found["arrays"]}
        assert became["inputs.state"].startswith("kept" if data == "pbmc" else "fresh: new genes")
        assert all(action.startswith("fresh") for name, action in became.items() if name.startswith("head."))
        assert all(action.startswith("kept") for name, action in became.items() if name.startswith("layer_"))
        assert found["rows"]["batch"]["kept"] == sorted(map(str, CONTEXTS[data][1])), "by their names within the source"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("finetune")])
def test_finetuning_needs_the_pretrained_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = tiny(presets.preset(name).experiment)
    data = name.partition("/")[2].partition("_")[0]
    with pytest.raises(ValueError, match=r"pretrained.run='runs/pretrain'"):
        train(experiment, cells_of(data, experiment.spec), "run")
