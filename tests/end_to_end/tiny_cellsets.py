"""Perturbed cells of two types and three donors, and settings that train on their sets in seconds."""

import anndata
import numpy as np
import pandas as pd

from scjax.data.preprocess import Preprocess
from scjax.data.sampling import CellSetSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutCrossed
from scjax.experiment import CellSetExperiment
from scjax.models.perturbdiff import Config
from scjax.predict import SetGenerationConfig
from scjax.train.optimizers import OptimizerConfig

GENES = tuple(f"g{i}" for i in range(8))
SIZES = {"ctrl": 7, "A": 6, "B": 5}  # cells of each type of each donor
TYPES = ("NK", "T")
DONORS = ("d1", "d2", "d3")
MODEL = Config(d_model=16, n_layers=1, n_heads=2, d_covariate=4, n_times=30)
EXPERIMENT = CellSetExperiment(
    model=MODEL,
    spec=DataSpec(space="counts", perturbation="drug", cell_type="kind", batch="donor", covariates=("kind", "donor")),
    split=HoldOutCrossed(covariates=("donor",), values=(("d3",),), conditions=("A",)),
    preprocess=Preprocess(scale=False, n_components=None),
    sampling=CellSetSampling(n_sets=2, n_cells=6),
    generation=SetGenerationConfig(n_cells=10, n_steps=3),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    n_steps=20,
    scan_steps=5,
    ema_decay=0.9,
    log_every=4,
    checkpoint_every=10,
)


def make_adata(
    genes: tuple[str, ...] = GENES, types: tuple[str, ...] = TYPES, donors: tuple[str, ...] = DONORS
) -> anndata.AnnData:
    """Counts whose levels drug, type and donor change, in random order."""
    rng = np.random.default_rng(3)
    cells = [(drug, kind, donor) for kind in types for donor in donors for drug, n in SIZES.items() for _ in range(n)]
    cells = [cells[i] for i in rng.permutation(len(cells))]
    # A name has its effect whatever else there is.
    of = lambda word: np.exp(np.random.default_rng(list(word.encode())).normal(size=len(genes)) / 2)  # noqa: E731
    level = [6.0 * of(drug) * of(kind) * of(donor) for drug, kind, donor in cells]
    obs = pd.DataFrame(cells, columns=["drug", "kind", "donor"], index=[f"cell{i}" for i in range(len(cells))])
    return anndata.AnnData(rng.poisson(level).astype(np.int32), obs=obs, var=pd.DataFrame(index=list(genes)))
