"""Every metric of cell-eval, computed by cell-eval itself on the same cells."""

import numpy as np
import pytest

from scjax.metrics.clustering import CLUSTERING_AGREEMENT
from scjax.metrics.expression import CELL_EVAL_METRICS, score_perturbations
from scjax.types import Population

cell_eval = pytest.importorskip(
    "cell_eval", reason="cell-eval is what is compared with; recordings of it: tests/parity"
)

GENES = [f"g{i}" for i in range(60)]
NAMES = [f"p{i}" for i in range(8)]


def cells(rng, rate, n):
    return np.log1p(rng.poisson(rate, (n, len(GENES))) / rate.sum() * 500).astype(np.float32)


@pytest.fixture(scope="module")
def world():
    """Effects of two kinds, that the predictions have in part."""
    rng = np.random.default_rng(0)
    base, kinds = np.exp(rng.normal(0.5, 1, len(GENES))), rng.normal(0, 0.8, (2, len(GENES)))
    real, pred = {}, {}
    for i, name in enumerate(NAMES):
        effect = kinds[i % 2] + rng.normal(0, 0.3, len(GENES))
        real[name] = cells(rng, base * np.exp(effect), 40 + i)
        pred[name] = cells(rng, base * np.exp(0.6 * effect + rng.normal(0, 0.2, len(GENES))), 50)
    return real, pred, cells(rng, base, 90)


@pytest.mark.filterwarnings("ignore")
def test_all_of_its_metrics(world, tmp_path):
    import anndata
    import pandas

    real, pred, control = world

    def annotated(side):
        names = np.repeat([*side, "control"], [*map(len, side.values()), len(control)])
        obs = pandas.DataFrame({"target": names}, index=[str(i) for i in range(len(names))])
        return anndata.AnnData(np.concatenate([*side.values(), control]), obs, pandas.DataFrame(index=GENES))

    evaluator = cell_eval.MetricsEvaluator(
        annotated(pred), annotated(real), control_pert="control", pert_col="target", num_threads=1, outdir=str(tmp_path)
    )
    table, _ = evaluator.compute(profile="full", write_csv=False, break_on_error=True)
    theirs = {row["perturbation"]: row for row in table.to_dicts()}
    assert set(theirs) == set(NAMES)

    populations = {name: Population((name,)) for name in NAMES}
    ours = score_perturbations(
        {populations[n]: x for n, x in pred.items()},
        {populations[n]: x for n, x in real.items()},
        {"": control},
        {**CELL_EVAL_METRICS, "clustering_agreement": CLUSTERING_AGREEMENT},
        genes=GENES,
    )
    assert set(table.columns) - {"perturbation"} == set(ours)
    for metric, values in ours.items():
        want = [theirs[name][metric] for name in NAMES]
        np.testing.assert_allclose([values[populations[n]] for n in NAMES], want, rtol=1e-5, atol=1e-7, err_msg=metric)
