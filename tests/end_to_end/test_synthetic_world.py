"""From an AnnData to held-out predictions, on a world whose answer is known: only interaction explains it.

Three models with interaction and three without learn the same populations, each three in one program: `jax.vmap` over
seeds of the library's own update. 300 steps of 128 cells are enough for the gap to be clear.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from scjax.data.collate import make_batches
from scjax.data.preprocess import preprocess_for
from scjax.data.sampling import TimeSeriesSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutTimes
from scjax.data.synthetic import InteractingParticles, to_anndata
from scjax.data.timeseries import prepare_time_series
from scjax.metrics.baselines import training_free
from scjax.metrics.population import wasserstein1
from scjax.models import scimf
from scjax.train.optimizers import OptimizerConfig, make_optimizer
from scjax.train.state import init_state
from scjax.train.step import make_update

pytestmark = pytest.mark.optimised  # hundreds of steps

SEEDS = (0, 1, 2)
HELD_OUT = (1.5, 3.0)
N_STEPS, CHUNK = 300, 50
WITH = scimf.Config(
    n_dims=4, n_heads=1, intrinsic_widths=(64, 64), dropout=0.0, sigma=0.1, energy_weight=0.001, dt=0.25
)
WITHOUT = replace(WITH, n_blocks=0)
KEYS = jax.vmap(jax.random.key)(jnp.array(SEEDS))


@pytest.fixture(scope="module")
def data():
    world = InteractingParticles().simulate(tuple(np.arange(9) * 0.5), seed=0)
    spec = DataSpec(expression="obsm/latent", space="latent", time="time", cell_type="kind")
    return prepare_time_series(to_anndata(world), spec, HoldOutTimes(times=HELD_OUT), preprocess_for("latent"))


def train(data, config, n_steps=N_STEPS):
    """Parameters of all seeds, stacked; seed s has initial values, batches and noise of its own."""
    sampling = TimeSeriesSampling(n_cells=128, n_targets=128)
    sources = [make_batches(data, sampling, seed=seed) for seed in SEEDS]
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="cosine", clip_norm=1.0), n_steps)
    update = jax.vmap(make_update(partial(scimf.loss, config=config), tx))
    run = jax.jit(lambda state, batches: jax.lax.scan(update, state, batches))
    state = jax.jit(jax.vmap(lambda key: init_state(scimf.init(key, config), tx, key)))(KEYS)
    for start in range(0, n_steps, CHUNK):
        batches = stack([stack([batch_at(n) for batch_at in sources]) for n in range(start, start + CHUNK)])
        state, _ = run(state, batches)
    return state.params


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def held_out_w1(data, params, config):
    """W1 of all 400 cells, simulated from time 0, to the 400 observed; seeds x held-out times."""
    x0 = jnp.asarray(data.population(0.0))
    simulate = jax.vmap(lambda p, key: scimf.simulate(p, x0, (0.0, *HELD_OUT), key, config=config).x[1:])
    predicted = np.asarray(jax.jit(simulate)(params, KEYS))
    return np.array(
        [[wasserstein1(x, data.population(t)) for x, t in zip(p, HELD_OUT, strict=True)] for p in predicted]
    )


def area_under_roc(score, positive):
    """The chance that a positive scores above a negative."""
    u = mannwhitneyu(score[positive], score[~positive]).statistic
    return u / (positive.sum() * (~positive).sum())


@pytest.fixture(scope="module")
def trained(data):
    return train(data, WITH)


def test_interaction_is_needed_to_predict_held_out_times(data, trained):
    with_, without = held_out_w1(data, trained, WITH), held_out_w1(data, train(data, WITHOUT), WITHOUT)
    print(f"\nW1 at {HELD_OUT}, with interaction:\n{with_.round(3)}\nwithout:\n{without.round(3)}")  # noqa: T201
    assert (with_.max(0) < without.min(0)).all(), "the worst seed with interaction beats the best one without"
    assert with_.mean() < 0.75 * without.mean()


@pytest.mark.slow
def test_above_the_floor_by_no_more_than_half_the_best_rules_excess(data):
    """The floor is what another draw of the world, of as many cells, has: 1.04. Five times the steps of the others."""
    found = held_out_w1(data, train(data, WITH, n_steps=1500), WITH).mean(axis=0)
    training = {t: data.population(t) for t in data.split.train}
    others = [InteractingParticles().simulate(tuple(np.arange(9) * 0.5), seed=seed) for seed in (11, 12, 13)]
    for t, ours in zip(HELD_OUT, found, strict=True):
        real = data.population(t)
        floor = np.mean([wasserstein1(other.at(t), real) for other in others])
        rules = {name: wasserstein1(b.cells, real) for name, b in training_free(training, t, seed=0).items()}
        best = min(rules, key=rules.get)
        print(f"\nW1 at {t}: {ours:.3f}; {best} {rules[best]:.3f}; floor {floor:.3f}")  # noqa: T201
        assert ours - floor < 0.5 * (rules[best] - floor)


def test_attention_finds_the_senders(data, trained):
    """Cells rank by what all others hear of them: column sums of the scores. True senders have a signal above 0."""
    scores_of = jax.jit(jax.vmap(lambda p, x: scimf.interaction_scores(p, x, config=WITH), in_axes=(0, None)))
    for time in HELD_OUT:
        x = data.population(time)
        scores = scores_of(trained, x)
        heard = np.asarray(scores).sum(axis=(1, 2))
        areas = [area_under_roc(h, x[:, 2] > 0) for h in heard]
        print(f"\nAUROC of true senders at {time}: {np.round(areas, 3)}")  # noqa: T201
        assert min(areas) > 0.8
