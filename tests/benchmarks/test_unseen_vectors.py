"""The vectors of the benchmark of unseen perturbations: what is near what, and that every target has one."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from scjax.data import datasets
from scjax.data.embeddings import check_table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("unseen_perturbations")


def targets(adata):
    return {name for condition in adata.obs["perturbation"] for name in condition.split("+")} - {"control"}


def test_genes_of_one_family_are_near_each_other(script):
    vectors = check_table(script.by_name())
    assert targets(datasets.norman2019()) == set(vectors)
    assert targets(datasets.mcfaline2023()) <= set(vectors)
    similar = lambda a, b: float(vectors[a] @ vectors[b])  # noqa: E731
    np.testing.assert_allclose([similar(name, name) for name in vectors], 1, rtol=1e-5)
    family = {name for name in vectors if name.startswith("MAP") and name != "MAP2K3"}
    others = set(vectors) - family - {"MAP2K3"}
    of_family, of_others = ([similar("MAP2K3", name) for name in some] for some in (family, others))
    assert np.mean(of_family) > np.mean(of_others) + 0.3
    assert max(vectors.keys() - {"MAP2K3"}, key=lambda name: similar("MAP2K3", name)) in family


def test_the_other_screen_tells_of_every_kinase(script, monkeypatch):
    """From its own cells alone: McFaline's are not looked at."""
    monkeypatch.setattr(datasets, "mcfaline2023", None)
    vectors = check_table(script.by_screen())
    monkeypatch.undo()
    assert targets(datasets.mcfaline2023()) <= set(vectors)
    assert {v.shape for v in vectors.values()} == {(script.N_COMPONENTS,)}


@pytest.mark.parametrize(("data", "model"), [("norman", "scdfm"), ("mcfaline", "scdfm"), ("mcfaline", "perturbdiff")])
def test_every_question_is_an_experiment_on_vectors(script, data, model):
    experiment = script.experiment_of(data, model, draw=0, n_steps=20)
    assert experiment.model.perturbation == "vector"
    assert experiment.spec.vectors == "vectors"
    assert experiment.n_steps == experiment.checkpoint_every == 20
    assert experiment.optimizer.n_warmup < 20
