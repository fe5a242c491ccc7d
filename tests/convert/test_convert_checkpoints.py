"""Converted checkpoints: what is written with the weights, who can open them, and what is refused."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert_systems import MODELS, weights_like

from scjax import checkpoint, convert, predict
from scjax.config import from_dict
from scjax.data.graph import neighbour_table
from scjax.data.vocabulary import Vocabulary
from scjax.models import scdfm
from scjax.predict import TrainedCellSets

SOURCE = {"source": "weights.pt", "sha256": "ab" * 32}
TOKENS = ("<pad>", "<cls>", "<mask>", "control", "A", "B", "C")
NAMES = {"perturbation": ["PBS", "drug1", "drug2"], "cell_type": ["B", "NK", "T"], "batch": {"d2": 1, "d1": 0}}
GENES = tuple(f"g{i}" for i in range(5))


def test_what_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    """So that the same command can be given again."""
    weights = weights_like("scimf")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointWriter, "save", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            convert.save(tmp_path / "new" / "c", weights, **SOURCE)
    assert list((tmp_path / "new").iterdir()) == []
    convert.save(tmp_path / "new" / "c", weights, **SOURCE)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c"]
    assert convert.load(tmp_path / "new" / "c").step == 0


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    weights = weights_like(request.param)
    state = convert.to_torch(weights)
    rng = np.random.default_rng(3)  # also where our parameters have no place
    state = {n: v if n == "diffusion.sigma" else rng.normal(size=v.shape).astype(np.float32) for n, v in state.items()}
    weights = convert.from_torch(state, **({"graph_heads": 2} if request.param == "scdfm" else {}))
    folder = tmp_path_factory.mktemp("saved") / "converted"
    convert.save(folder, weights, **SOURCE)
    return folder, weights, state


def test_everything_comes_back(saved):
    folder, weights, state = saved
    found = convert.load(folder)
    assert found.weights._replace(params=None, constants=None, originals=None) == weights._replace(
        params=None, constants=None, originals=None
    )
    jax.tree.map(np.testing.assert_array_equal, found.weights.params, weights.params)
    assert (found.genes, found.names, found.step) == ((), {}, 0)
    back = convert.to_torch(found.weights)
    assert set(back) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_what_never_was_a_state_dict_becomes_a_whole_one(name, tmp_path):
    """With the tensors that the reference holds and we do not."""
    weights = weights_like(name)
    convert.save(tmp_path / "c", weights, **SOURCE)
    assert set(convert.to_torch(convert.load(tmp_path / "c").weights)) == set(convert.to_torch(weights))


def test_what_is_told(saved):
    folder, weights, _ = saved
    told = convert.told(folder)
    assert "from weights.pt, sha256 abab" in told
    assert str(sum(leaf.size for leaf in jax.tree.leaves(weights.params))) in told
    for name, value in weights.assumed.items():
        assert f"{name}={value}" in told
    about = checkpoint.read_about(folder)
    assert about["model"]["d_model" if weights.system != "scimf" else "n_dims"]
    assert about["provenance"]["versions"]["scjax"]


def test_nothing_is_overwritten(saved, tmp_path):
    folder, weights, _ = saved
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(ValueError, match="exists already and is not overwritten"):
        convert.save(folder, weights, **SOURCE)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_what_predictions_lack(saved):
    """Who opens it as a run learns what is missing and what works instead, and PerturbDiff is one."""
    folder, weights, _ = saved
    if weights.system == "perturbdiff":
        trained = predict.load(folder)
        assert isinstance(trained, TrainedCellSets)
        assert trained.genes == ()
        assert trained.names.sources == (weights.spaces or ("",))
        assert "no predictions from cells" in convert.told(folder)
        return
    lacks = {"scimf": "without the transform into the latent space", "scdfm": "without the gene graph"}[weights.system]
    with pytest.raises(ValueError, match=f"{lacks}.*scjax.convert.load opens them"):
        predict.load(folder)
    assert f"scjax.models.{weights.system}" in convert.told(folder)


def test_a_damaged_one_is_noticed(saved, tmp_path):
    folder, *_ = saved
    shutil.copytree(folder, tmp_path / "copy")
    manifest = tmp_path / "copy" / "0" / "about" / "metadata"
    text = manifest.read_text()
    assert "abab" in text
    manifest.write_text(text.replace("abab", "cdcd", 1))
    with pytest.raises(ValueError, match="is damaged"):
        convert.load(tmp_path / "copy")


@pytest.mark.parametrize(
    "vocabulary",
    [dict(zip(TOKENS, range(7), strict=True)), {"tokens": TOKENS}, {"tokens": {t: i for i, t in enumerate(TOKENS)}}],
)
def test_vocabulary_of_scdfm(tmp_path, vocabulary):
    convert.save(tmp_path / "c", weights_like("scdfm"), **SOURCE, vocabulary=vocabulary, genes=("C", "A"))
    found = convert.load(tmp_path / "c")
    assert found.names == {"tokens": TOKENS, "perturbations": ("control",)}
    assert found.genes == ("C", "A")
    ours = from_dict(Vocabulary, json.loads(json.dumps(found.about["vocabulary"])))
    assert ours.gene_tokens(found.genes).tolist() == [6, 4]
    assert ours.encode([("B",)], "gene", 2).tolist() == [[5, 3]]


def test_sampling_with_a_converted_scdfm(tmp_path):
    """Its vocabulary numbers genes and perturbations, and the graph of the training cells; the table has more rows."""
    convert.save(tmp_path / "c", weights_like("scdfm"), **SOURCE, vocabulary={"tokens": TOKENS})
    found = convert.load(tmp_path / "c")
    vocabulary = from_dict(Vocabulary, found.about["vocabulary"])
    genes, config = ("C", "A", "B"), found.weights.config
    assert vocabulary.n_tokens < config.n_tokens
    graph = neighbour_table(np.eye(3, dtype=bool), genes, vocabulary)
    made = jax.jit(partial(scdfm.sample, config=config, n_steps=2, solver="euler"))(
        found.weights.params,
        jnp.ones((4, 3)),
        jnp.asarray(vocabulary.encode([("A", "B")] * 4, "gene", 2)),
        jnp.asarray(vocabulary.gene_tokens(genes)),
        jax.random.key(0),
        constants=scdfm.Constants(jnp.asarray(graph)),
    )
    assert made.shape == (4, 3)
    assert np.isfinite(made).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vocabulary": {"A": 0, "B": 1}}, "vocabulary must begin with <pad>, <cls>, <mask>, control; got A, B"),
        ({"vocabulary": dict(zip(TOKENS, range(1, 8), strict=True))}, "must give the ids 0, 1, ... to its 7 names"),
        ({"vocabulary": {**dict.fromkeys(TOKENS, 0)}}, "must give the ids 0, 1, ... to its 7 names"),
        ({"vocabulary": {"tokens": (*TOKENS, "D", "E", "F")}}, "vocabulary must be the model's 9 or fewer; got 10"),
        ({"vocabulary": {"tokens": (*TOKENS, "A")}}, "vocabulary must be unique; 'A' is repeated"),
        ({"vocabulary": {"tokens": "text"}}, "vocabulary must be a list of names"),
        ({"vocabulary": {"tokens": TOKENS}, "genes": ("A", "X")}, "genes: X have no token"),
        ({"vocabulary": {"tokens": TOKENS, "perturbations": ["A"]}}, "perturbations must have 'control'; got A"),
        ({"genes": ("A",)}, "give the vocabulary, too"),
        ({"spec": {"perturbation": "x"}}, "spec is not of scDFM"),
    ],
)
def test_names_that_do_not_fit_scdfm(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        convert.save(tmp_path / "c", weights_like("scdfm"), **SOURCE, **more)
    assert not (tmp_path / "c").exists()


def test_names_of_perturbdiff(tmp_path):
    spec = {"perturbation": "drug", "control": ["PBS"], "cell_type": "kind", "batch": "donor", "covariates": ["kind"]}
    weights = weights_like("perturbdiff")
    convert.save(tmp_path / "c", weights, **SOURCE, genes=GENES, vocabulary=NAMES, spec=spec)
    trained = predict.load(tmp_path / "c")
    assert trained.names.perturbation == ("control", "PBS", "drug1", "drug2")
    assert trained.names.batch == ("d1", "d2")
    assert trained.genes == GENES
    assert trained.spec.space == "lognormalised"
    assert trained.names.cell_type_column == "kind"
    x = np.random.default_rng(0).random((4, 5), np.float32)
    np.testing.assert_allclose(trained.transform.apply(x, GENES), x, rtol=1e-6)
    assert "scjax predict: yes" in convert.told(tmp_path / "c")
    assert convert.load(tmp_path / "c").names["cell_type"] == ("B", "NK", "T")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"genes": ("a", "b")}, "genes must be the model's 5; got 2"),
        ({"genes": ("a", "b", "c", "d", "a")}, "genes must be unique; 'a' is repeated"),
        ({"vocabulary": {"cell_type": ["T"]}}, "vocabulary: cell_type must be the model's 3; got 1"),
        ({"vocabulary": {"perturbation": ["a", "b"]}}, "vocabulary: perturbation must be the model's 4; got 2"),
        ({"vocabulary": {"donor": ["a"]}}, "has perturbation, cell_type, batch and dose; got 'donor'"),
        ({"vocabulary": {"batch": {"a": 0, "b": 2}}}, "batch must give the ids 0, 1, ... to its 2 names"),
        ({"vocabulary": {"batch": ["a", 3]}}, "batch must be a list of names"),
        ({"vocabulary": {"dose": [0.5]}}, "vocabulary: dose must be the model's 0; got 1"),
        ({"vocabulary": {"dose": ["much"]}}, "dose must be a list of numbers"),
        ({"spec": {"perturbation": "x", "space": "counts"}}, "cells be log-normalised.*space='counts'"),
    ],
)
def test_names_that_do_not_fit_perturbdiff(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        convert.save(tmp_path / "c", weights_like("perturbdiff"), **SOURCE, **more)
    assert not (tmp_path / "c").exists()


def test_names_of_vectors(tmp_path):
    """Rows of GenePT vectors are the dictionary's own; those of a table have one for "no perturbation" before them."""
    names = [f"p{i}" for i in range(11)]
    convert.save(tmp_path / "own", weights_like("vectors"), **SOURCE, vocabulary={"perturbation": names})
    assert predict.load(tmp_path / "own").names.perturbation == tuple(names)
    convert.save(tmp_path / "more", weights_like("vectors"), **SOURCE, vocabulary={"perturbation": names[:10]})
    assert predict.load(tmp_path / "more").names.perturbation == ("control", *names[:10])
    weights = weights_like("perturbdiff")
    without = weights._replace(config=replace(weights.config, batch="none", n_batches=None))
    with pytest.raises(ValueError, match="the model has no batchs to be named"):
        convert.save(tmp_path / "none", without, **SOURCE, vocabulary={"batch": ["a"]})


def test_doses_are_among_what_a_prediction_needs(tmp_path):
    weights = weights_like("perturbdiff")
    weights = weights._replace(config=replace(weights.config, n_doses=2))
    complete = {"genes": GENES, "spec": {"perturbation": "drug", "dose": "dose"}}
    convert.save(tmp_path / "without", weights, **SOURCE, **complete, vocabulary=NAMES)
    assert "the doses (--vocabulary)" in convert.told(tmp_path / "without")
    convert.save(tmp_path / "with", weights, **SOURCE, **complete, vocabulary=NAMES | {"dose": [0, 0.5]})
    trained = predict.load(tmp_path / "with")
    assert trained.names.dose == (0.0, 0.5)
    assert trained.about["trained"]["dose"] == [0.0, 0.5]


def test_scimf_has_no_names(tmp_path):
    with pytest.raises(ValueError, match="are not of scIMF, whose cells are points of a latent space"):
        convert.save(tmp_path / "c", weights_like("scimf"), **SOURCE, genes=GENES)


def test_other_checkpoints(tmp_path):
    with checkpoint.CheckpointWriter(tmp_path / "other", about={"run": "x", "kind": "cat"}) as writer:
        writer.save(1, {"state": {"params": np.ones(2)}})
    with pytest.raises(ValueError, match="holds checkpoints of kind 'cat', not of scimf, scdfm, perturbdiff"):
        convert.load(tmp_path / "other")
    with pytest.raises(ValueError, match="there is no folder"):
        convert.load(tmp_path / "none")
