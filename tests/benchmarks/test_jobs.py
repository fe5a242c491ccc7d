"""Every job of the benchmarks still builds and runs, at toy sizes: the library changes under them."""

import importlib
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {
    "scimf": {"TS": (0.0, 0.5), "N_CELLS": 8, "N_DIMS": 4, "N_START": 16, "STEPS_PER_CALL": 1},
    "scdfm": {
        "N_GENES": 40, "N_SUBSET": 12, "N_TOKENS": 44, "D_MODEL": 16, "N_LAYERS": 1, "N_HEADS": 2, "N_NEIGHBOURS": 3,
        "PERTURBATION": (10, 3), "STEPS_PER_CALL": 1, "N_SOLVER_STEPS": 1,
    },
    "perturbdiff": {
        "N_CELLS": 6, "N_GENES": 20, "D_MODEL": 8, "N_LAYERS": 1, "N_HEADS": 2, "N_SOLVER_STEPS": 2, "N_PEER_STEPS": 1,
    },
}  # fmt: skip
N = {"scimf": (5, 4), "scdfm": (2, 2), "perturbdiff": (2, 12)}  # of training, of sampling


@pytest.fixture
def job(request, monkeypatch):
    """The job of a model, made small."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(importlib.import_module("jobs.sides"), "GEMM_SIZE", 16)
    module = importlib.import_module(f"jobs.{request.param}")
    for name, value in SIZES[request.param].items():
        monkeypatch.setattr(module, name, value)
    yield module
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def ran(job):
    job.call()
    assert job.n_per_call >= 1
    if job.gemm is not None:
        assert math.isfinite(job.gemm())
        assert job.flops > 0
        assert job.state_bytes > 0
    return job


# scDFM's side is left out: its layers take as long to compile at toy sizes as at their own.
@pytest.mark.parametrize("job", ["scimf", "perturbdiff"], indirect=True)
def test_scjax_trains_and_samples(job):
    name = job.__name__.removeprefix("jobs.")
    of_training, of_sampling = N[name]
    assert ran(job.train_scjax(of_training)).temp_bytes > 0
    assert ran(job.sample_scjax(of_sampling)).compile_s > 0


@pytest.mark.parametrize("job", SIZES, indirect=True)
def test_the_peer_trains_and_samples(job):
    pytest.importorskip("torch", reason="benchmarks' other side; of the extra 'torch'")
    name = job.__name__.removeprefix("jobs.")
    of_training, of_sampling = N[name]
    ran(job.train_peer(of_training))
    ran(job.sample_peer(of_sampling))


@pytest.mark.parametrize("job", ["perturbdiff"], indirect=True)
def test_the_second_distance_for_the_log_is_counted(job):
    pytest.importorskip("torch", reason="benchmarks' other side; of the extra 'torch'")
    once, twice = ran(job.train_peer_log_once(2)), job.train_peer(2)
    # three matrices of distances between 6 cells of 20 genes, for each of 2 sets
    assert twice.flops - once.flops == 3 * 2 * (2 * 6 * 6 * 20)
    with pytest.raises(ValueError, match="cells must be whole sets of 6; got 7"):
        job.sample_peer(7)
