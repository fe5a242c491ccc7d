"""A time series of 46 cells and settings that train on it in a second."""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from scjax.data.preprocess import Preprocess
from scjax.data.sampling import TimeSeriesSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutTimes
from scjax.experiment import TimeSeriesExperiment
from scjax.models.scimf import Config
from scjax.train.optimizers import OptimizerConfig

SIZES = {0.0: 14, 1.0: 12, 2.0: 11, 4.0: 9}
GENES = tuple(f"g{i}" for i in range(12))
EXPERIMENT = TimeSeriesExperiment(
    model=Config(n_dims=3, n_heads=1, intrinsic_widths=(8,), dt=0.5, blur=0.5, scaling=0.5),
    spec=DataSpec(space="counts", time="day", cell_type="kind"),
    split=HoldOutTimes(times=(2.0,)),
    preprocess=Preprocess(n_components=3),
    sampling=TimeSeriesSampling(n_cells=10),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    n_steps=20,
    scan_steps=5,
    ema_decay=0.9,
    log_every=4,
    checkpoint_every=10,
)


def make_adata() -> anndata.AnnData:
    """Counts whose levels drift with the day; days in random order, and an obs column besides."""
    rng = np.random.default_rng(7)
    day = rng.permutation(np.repeat(list(SIZES), list(SIZES.values())))
    level = 4.0 + np.outer(day, np.linspace(0.0, 3.0, len(GENES)))
    obs = pd.DataFrame(
        {"day": day, "kind": np.where(day > 1, "late", "early"), "batch": "one"},
        index=[f"cell{i}" for i in range(len(day))],
    )
    counts = rng.poisson(level).astype(np.int32)
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(GENES)))


def damaged_copy(run: Path, folder: Path, how: str) -> Path:
    """The run with the largest data file of its newest checkpoint cut in half, or with one bit of it flipped."""
    shutil.copytree(run, folder)
    newest = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    victim = max((newest / "arrays" / "d").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return folder
