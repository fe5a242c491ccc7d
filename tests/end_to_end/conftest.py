"""One trained run of each kind, shared by all tests of this folder."""

import pytest
import tiny_cellsets
import tiny_perturbation
import tiny_series

from scjax.experiment import train
from scjax.predict import load


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """What `train` returned. The folder is for reading only."""
    return train(tiny_series.EXPERIMENT, tiny_series.make_adata(), tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def trained(tiny_run):
    return load(tiny_run.workdir)


@pytest.fixture
def adata():
    return tiny_series.make_adata()


@pytest.fixture(scope="session")
def perturbation_run(tmp_path_factory):
    """As `tiny_run`, on perturbations."""
    folder = tmp_path_factory.mktemp("perturbation") / "run"
    return train(tiny_perturbation.EXPERIMENT, tiny_perturbation.make_adata(), folder)


@pytest.fixture(scope="session")
def perturbation_trained(perturbation_run):
    return load(perturbation_run.workdir)


@pytest.fixture(scope="session")
def cellset_run(tmp_path_factory):
    """As `tiny_run`, on cell sets."""
    return train(tiny_cellsets.EXPERIMENT, tiny_cellsets.make_adata(), tmp_path_factory.mktemp("cellsets") / "run")


@pytest.fixture(scope="session")
def cellset_trained(cellset_run):
    return load(cellset_run.workdir)
