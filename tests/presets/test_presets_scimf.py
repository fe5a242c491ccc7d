"""The presets of scIMF: they say what they are; ours takes any latent series, the paper's keep its settings."""

from dataclasses import replace

import numpy as np
import pytest

from scjax import presets
from scjax.config import from_dict, to_dict
from scjax.data.synthetic import OrnsteinUhlenbeck, to_anndata
from scjax.experiment import timeseries

NAMES = [name for name in presets.names() if name.startswith("scimf/")]


@pytest.mark.parametrize("name", NAMES)
def test_presets_name_what_a_user_wants_to_know(name):
    found = presets.preset(name)
    assert f"--preset {name} " in found.command or name == "scimf/klein"
    assert all((found.summary, found.cost, found.expected, found.source))
    assert from_dict(type(found.experiment), to_dict(found.experiment)) == found.experiment


@pytest.mark.parametrize("name", ["scimf/zebrafish", "scimf/mef", "scimf/pancreas"])
def test_the_paper_stays_faithful(name):
    """What scimf/series changes is the reference's here."""
    e = presets.preset(name).experiment
    assert (e.model.debiased, e.model.blur, e.model.energy_weight, e.model.sigma) == (True, 0.1, 1.0, 0.1)
    assert (e.model.intrinsic_widths, e.model.dropout, e.time_scale) == ((256, 256), 0.1, "index")
    assert (e.sampling.n_cells, e.sampling.n_targets, e.n_steps) == (512, None, 3000)


def test_series_takes_a_latent_of_its_width():
    world = OrnsteinUhlenbeck(start=tuple(np.linspace(-1, 1, 10))).simulate((0.0, 1.0, 2.5), seed=0, n_cells=12)
    experiment = presets.preset("scimf/series").experiment
    task = timeseries.prepare(experiment, to_anndata(world))
    batch = task.batches(0)
    assert batch.x0.shape == (96, 10)
    assert batch.targets.shape == (2, 96, 10)
    assert batch.ts == (0.0, 0.8, 2.0)
    np.testing.assert_allclose(task.data.latent.var(axis=0).mean(), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="Set model.n_dims=10"):
        timeseries.prepare(replace(experiment, model=replace(experiment.model, n_dims=4)), to_anndata(world))
