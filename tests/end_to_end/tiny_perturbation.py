"""Perturbations of 139 cells in two lines, and settings that train on them in seconds."""

import anndata
import numpy as np
import pandas as pd

from scjax.data.graph import GraphRule
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import PairedSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutSeenDoubles
from scjax.experiment import PerturbationExperiment
from scjax.models.scdfm import Config
from scjax.predict import GenerationConfig
from scjax.train.optimizers import OptimizerConfig

GENES = tuple(f"g{i}" for i in range(10))
# As a user's file has them: the order in a pair differs, "z" is no measured gene.
SIZES = {"ctrl": 20, "g1+ctrl": 12, "ctrl+g0": 11, "z+ctrl": 10, "g1+g0": 9, "g0+z": 8}
LINES = ("A1", "B2")
EXPERIMENT = PerturbationExperiment(
    model=Config(d_model=8, n_layers=1, n_heads=2, graph_heads=2, dropout=0.1),
    spec=DataSpec(space="counts", perturbation="condition", covariates=("line",)),
    split=HoldOutSeenDoubles(),
    preprocess=Preprocess(scale=False, n_components=None),
    graph=GraphRule(n_neighbours=3),
    sampling=PairedSampling(n_populations=2, n_cells=6, n_genes=7),
    generation=GenerationConfig(n_cells=10, n_steps=3),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    n_steps=20,
    scan_steps=5,
    ema_decay=0.9,
    log_every=4,
    checkpoint_every=10,
)


def make_adata() -> anndata.AnnData:
    """Counts whose levels a perturbation changes, in random order, and an obs column besides."""
    rng = np.random.default_rng(3)
    names = [(name, line) for line in LINES for name, n in SIZES.items() for _ in range(n)]
    names = [names[i] for i in rng.permutation(len(names))][:-1]
    effect = {
        name: np.exp(np.random.default_rng([5, i]).normal(size=len(GENES))) for i, name in enumerate(("g0", "g1", "z"))
    }
    level = [6.0 * np.prod([effect.get(part, np.ones(len(GENES))) for part in c.split("+")], axis=0) for c, _ in names]
    obs = pd.DataFrame(names, columns=["condition", "line"], index=[f"cell{i}" for i in range(len(names))])
    obs["batch"] = "one"
    return anndata.AnnData(rng.poisson(level).astype(np.int32), obs=obs, var=pd.DataFrame(index=list(GENES)))
