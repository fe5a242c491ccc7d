"""One trained run, shared by all tests of this folder."""

import pytest
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
