"""PerturbDiff on populations that are themselves drawn, from an AnnData through a checkpoint to generated sets.

Gaussian populations: the network is the optimal denoiser, which is known. Mixtures whose weight and shift vary from set
to set, and nobody tells: generated sets have the spread of true ones, which no prediction of the mean population has.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from scjax.data.preprocess import Preprocess
from scjax.data.sampling import CellSetSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutNone
from scjax.data.synthetic import GaussianPopulations, VaryingMixtures
from scjax.experiment import CellSetExperiment, train
from scjax.models import perturbdiff
from scjax.predict import SetGenerationConfig, load
from scjax.predict.cellsets import generate, read_sources
from scjax.processes.diffusion import diffuse, make_schedule, respaced, set_noise
from scjax.train.optimizers import OptimizerConfig
from scjax.types import Population

pytestmark = pytest.mark.optimised  # hundreds of steps

STIMULATED = Population(("stimulated",), "")
MODEL = perturbdiff.Config(
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_covariate=8,
    covariate_width="model",
    cell_type="none",
    batch="none",  # each set is a batch of its own: told, it would give the population away
    condition_dropout=0.0,
    divisor=1.0,
)
N_CELLS = 16
EXPERIMENT = CellSetExperiment(
    model=MODEL,
    spec=DataSpec(space="lognormalised", perturbation="perturbation", batch="batch"),
    split=HoldOutNone(),
    preprocess=Preprocess(library_size=None, log1p=False, scale=False, n_components=None),
    sampling=CellSetSampling(n_sets=16, n_cells=N_CELLS),
    generation=SetGenerationConfig(n_steps=50, guidance=1.0),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", clip_norm=1.0),
    n_steps=600,
    scan_steps=50,
    ema_decay=0.99,
    log_every=300,
    checkpoint_every=600,
)


def trained_on(world, experiment, folder, n_sets=2000):
    """A run on sets of this world, and a function that generates sets of it, float64[sets, cells, genes]."""
    n_cells = experiment.sampling.n_cells
    adata = world.simulate(seed=1, n_sets=n_sets, n_cells=n_cells).to_anndata()
    train(experiment, adata, folder)
    trained = load(folder)
    sources = read_sources(trained, adata)

    def sets(n, **settings):
        generation = replace(trained.generation, n_cells=n * n_cells, **settings)
        made = generate(trained, sources, [STIMULATED], generation=generation)[0][STIMULATED]
        assert np.array_equal(np.bincount(made.set), np.full(n, n_cells))
        return np.stack([made.x[made.set == i] for i in range(n)]).astype(np.float64)

    return trained, sets


# ---------------------------------------------------------------- Gaussian populations

# As low as the world allows (its cells stay six standard deviations above zero): the network cannot be negative.
GAUSSIANS = GaussianPopulations(n_genes=3, level=3.5, shift=0.5)
OF_GAUSSIANS = replace(
    EXPERIMENT,
    model=replace(MODEL, n_layers=1, energy_weight=0.0),
    sampling=CellSetSampling(n_sets=32, n_cells=8),
    optimizer=replace(EXPERIMENT.optimizer, learning_rate=5e-3),
    n_steps=3000,
    checkpoint_every=3000,
    log_every=500,
)
TIMES = (100, 200, 300, 400)  # noise over signal from 0.3 to 2, where both the cells and what is known of them count


def denoising_errors(trained, n_sets=64):
    """Root mean squares of departures from the closed form, for each time: of the network's first guess and of its
    second, which has seen the first; then, for comparison, of the mean population and of the best guess that looks at
    a cell alone.
    """
    true = GAUSSIANS.simulate(seed=2, n_sets=n_sets, n_cells=8)
    x0, control = (jnp.asarray(x, jnp.float32) for x in (true.x, true.control))
    schedule = make_schedule(trained.config.schedule, trained.config.n_times)

    @jax.jit
    def guess(x_t, t, control, before):
        told = {"perturbation": jnp.ones(n_sets, jnp.int32)}
        return perturbdiff.denoise(
            trained.params, x_t, t, control, told, before, constants=trained.constants, config=trained.config
        )

    centre = GAUSSIANS.level + GAUSSIANS.shift
    variance = GAUSSIANS.between_std**2 + GAUSSIANS.within_std**2
    found = []
    for time in TIMES:
        t, alpha_bar = jnp.full(n_sets, time, jnp.int32), float(schedule.alphas_cumprod[time])
        x_t = diffuse(schedule, x0, t, set_noise(jax.random.key(time), x0.shape))
        first = guess(x_t, t, control, jnp.zeros_like(x_t))  # zeros are what no guess is
        noised = np.asarray(x_t, np.float64)
        best = GAUSSIANS.denoise(noised, alpha_bar)
        slope = np.sqrt(alpha_bar) * variance / (alpha_bar * variance + 1 - alpha_bar)
        alone = centre + slope * (noised - np.sqrt(alpha_bar) * centre)
        guesses = first, guess(x_t, t, control, first), centre, alone
        found.append([np.sqrt(np.mean((np.asarray(x, np.float64) - best) ** 2)) for x in guesses])
        print(f"\nt = {time}: first, second guess, mean population, cell alone {np.round(found[-1], 3)}")  # noqa: T201
    return np.array(found)


def gaussian_ratios(x):
    """Of generated sets: the error of the mean in standard errors, and the variances of set means and within sets as
    multiples of the true ones; of each gene.
    """
    of_means = GAUSSIANS.between_std**2 + GAUSSIANS.within_std**2 / x.shape[1]
    means = x.mean(axis=1)
    error = (means.mean(axis=0) - GAUSSIANS.level - GAUSSIANS.shift) / np.sqrt(of_means / len(x))
    between = np.cov(means.T) / of_means
    within = np.mean([np.cov(cells.T) for cells in x], axis=0) / GAUSSIANS.within_std**2
    for name, value in (("mean", error), ("between sets", between), ("within sets", within)):
        print(f"\n{name}:\n{value.round(2)}")  # noqa: T201
    return error, between, within


def ddim_variance(signal, noise, n_steps):
    """Of what DDIM makes with the optimal denoiser, over the true variance `signal`; `noise` is that at the start.

    Each step takes x - E x to a multiple of it: 0.84 for the cells above in 50 steps, 0.99 in 1000.
    """
    schedule = respaced(make_schedule("linear"), n_steps).schedule
    a, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    shrink = np.sqrt(a) * signal / (a * signal + (1 - a) * noise)
    steps = np.sqrt(before) * shrink + np.sqrt((1 - before) / (1 - a)) * (1 - np.sqrt(a) * shrink)
    return np.prod(steps) ** 2 * noise / signal


def test_gaussian_populations(tmp_path):
    """The network is near the optimal denoiser, which shrinks a set's mean and its cells by ratios of their own, and
    generated sets have the moments that they should.

    Who looks at each cell alone, however well, cannot: a network that ignored the other cells would be at 1 below.
    """
    trained, sets = trained_on(GAUSSIANS, OF_GAUSSIANS, tmp_path / "run")
    first, second, mean_population, alone = denoising_errors(trained).T
    for guess in (first, second):
        assert np.all(guess < 0.4 * alone)
        assert np.all(guess < 0.3 * mean_population)
    error, between, within = gaussian_ratios(sets(256))
    assert np.abs(error).max() < 4
    # Fifty steps of DDIM lose some of the spread even with the optimal denoiser.
    of_between = ddim_variance(GAUSSIANS.between_std**2 + GAUSSIANS.within_std**2 / 8, 1 / 8, 50)
    of_within = ddim_variance(GAUSSIANS.within_std**2, 1.0, 50)
    print(f"\nexpected between {of_between:.3f}, within {of_within:.3f}")  # noqa: T201
    np.testing.assert_allclose(between, of_between * np.eye(3), atol=0.35)  # 4 standard errors of 256 sets
    np.testing.assert_allclose(within, of_within * np.eye(3), atol=0.2)  # a model this small loses some more


# ---------------------------------------------------------------- mixtures that vary from set to set

MIXTURES = VaryingMixtures(n_genes=3)
OF_MIXTURES = replace(
    EXPERIMENT,
    model=replace(MODEL, energy_weight=0.0),
    n_steps=2500,
    checkpoint_every=2500,
    log_every=500,
)
SPREADS = ("set means", "shifts", "weights")


def spreads(x, name):
    """Standard deviations over sets, as multiples of what the world's formulas give for sets of so many cells.

    Of 256 true sets each is 1, give or take 0.05.
    """
    n_cells = x.shape[1]
    mean, variance = MIXTURES.weight_moments()
    weights, shifts = MIXTURES.weight(x), MIXTURES.shift(x)
    ratios = np.array(
        [
            np.trace(np.cov(x.mean(axis=1).T)) / np.trace(MIXTURES.set_mean_covariance(n_cells)),
            shifts.var(ddof=1) / (MIXTURES.shift_std**2 + MIXTURES.std**2 / n_cells),
            weights.var(ddof=1) / (variance + (mean - mean**2 - variance) / n_cells),
        ]
    )
    print(f"\n{name}: spread of {SPREADS} {np.sqrt(ratios).round(2)}; mean weight {weights.mean():.3f}")  # noqa: T201
    return np.sqrt(ratios)


def assert_spread_of_a_population_of_populations(experiment, folder):
    """Sets of the model beside true ones, and beside the two ways to be right on average alone: the cells of all true
    sets dealt anew, and what the model predicts of pure noise.

    A model this small, after this little training, has 0.7 to 0.9 of the true spread.
    """
    _, sets = trained_on(MIXTURES, experiment, folder)
    truth = MIXTURES.simulate(seed=2, n_sets=256, n_cells=N_CELLS).x
    dealt = np.random.default_rng(0).permutation(truth.reshape(-1, truth.shape[-1])).reshape(truth.shape)
    made = sets(256)
    np.testing.assert_allclose(spreads(truth, "true sets"), 1, atol=0.15)
    np.testing.assert_allclose(made.mean((0, 1)), MIXTURES.mean(), atol=0.15)  # standard error 0.03
    of_model = spreads(made, "the model's sets")
    assert np.all(of_model > (0.65, 0.75, 0.6))
    assert np.all(of_model < 1.2)
    assert np.all(of_model > spreads(dealt, "cells dealt anew") + (0.2, 0.3, 0.1))
    # Its shares tell nothing: all cells lie near where the two kinds divide.
    assert spreads(sets(256, n_steps=1), "one step: the point predicted of pure noise")[:2].max() < 0.2


def test_sets_differ_as_true_sets_do(tmp_path):
    """With the published noise, of each cell by itself: for sets of so few cells it moves whole sets as well."""
    assert_spread_of_a_population_of_populations(OF_MIXTURES, tmp_path / "run")


@pytest.mark.slow
def test_sets_differ_as_true_sets_do_with_shared_noise(tmp_path):
    experiment = replace(OF_MIXTURES, model=replace(OF_MIXTURES.model, shared_noise=0.2))
    assert_spread_of_a_population_of_populations(experiment, tmp_path / "run")


def optimal_sets(energy, *, n_steps, n_sets=128, n_cells=16, seed=0):
    """Cells along the response, float64[sets, cells], that DDIM makes if every prediction minimises the expected loss.

    Along the response alone a world of mixtures has one dimension, where the minimum is known. Given the weight, noised
    cells are independent, so that the posterior of weight and responses is exact on a grid of weights. Of all sets f,
    in the order of the noised cells,

        d/df_i E[squared error + energy * energy distance] = 2/n (f_i - E x_i) + energy 2/n (F(f_i) - (i - 1/2) / n)

    with F the distribution of a cell of the set given the noised set. It rises with f_i: bisection finds its zero.
    """
    world, rng = VaryingMixtures(), np.random.default_rng(seed)
    centres, variance = world.level + np.array([0.0, world.effect]), world.std**2
    weights = (np.arange(50) + 0.5) / 50
    prior = weights ** (world.alpha - 1) * (1 - weights) ** (world.beta - 1)
    prior = np.log(prior / prior.sum())
    schedule = respaced(make_schedule("linear"), n_steps).schedule
    x, ranks = rng.standard_normal((n_sets, n_cells)), (np.arange(n_cells) + 0.5) / n_cells
    for a, before in zip(schedule.alphas_cumprod[::-1], schedule.alphas_cumprod_prev[::-1], strict=True):
        x = np.sort(x, axis=1)
        noised = a * variance + 1 - a
        log_likelihood = -((x[..., None] - np.sqrt(a) * centres) ** 2) / (2 * noised)
        likelihood = np.exp(log_likelihood - log_likelihood.max(axis=-1, keepdims=True))
        of_weight = weights * likelihood[..., 1:] + (1 - weights) * likelihood[..., :1]
        of_set = np.log(of_weight).sum(axis=1) + prior
        of_set = np.exp(of_set - of_set.max(axis=1, keepdims=True))
        of_set /= of_set.sum(axis=1, keepdims=True)
        responds = np.einsum("sg,scg->sc", of_set, weights * likelihood[..., 1:] / of_weight)
        shares = np.stack([1 - responds, responds], axis=-1)
        means = centres + np.sqrt(a) * variance / noised * (x[..., None] - np.sqrt(a) * centres)
        scale = np.sqrt(variance * (1 - a) / noised)
        mean = x0 = np.sum(shares * means, axis=-1)
        if energy > 0:
            low, high = np.full_like(x, centres[0] - 3), np.full_like(x, centres[1] + 3)
            for _ in range(16):
                x0 = (low + high) / 2
                below = ndtr((x0[:, :, None, None] - means[:, None]) / scale)
                rising = x0 - mean + energy * (np.sum(shares[:, None] * below, axis=-1).mean(axis=-1) - ranks)
                low, high = np.where(rising < 0, x0, low), np.where(rising < 0, high, x0)
        x = np.sqrt(before) * x0 + np.sqrt((1 - before) / (1 - a)) * (x - np.sqrt(a) * x0)
    return x


def optimal_spread(energy, n_steps):
    """Of set means and of the shares of responding cells, as multiples of the world's own for sets of so many cells."""
    world, x = VaryingMixtures(), optimal_sets(energy, n_steps=n_steps)
    mean, variance = world.weight_moments()
    of_shares = variance + (mean - mean**2 - variance) / x.shape[1]
    of_means = world.effect**2 * of_shares + world.std**2 / x.shape[1]
    shares = np.mean(x > world.level + world.effect / 2, axis=1)
    return x.mean(axis=1).std(ddof=1) / np.sqrt(of_means), shares.std(ddof=1) / np.sqrt(of_shares)


def test_squared_error_keeps_the_spread_and_the_energy_distance_takes_of_it():
    """With the best prediction at every step; 128 true sets have 1, give or take 0.06.

    The best prediction for the energy distance has the cells of all populations that are still possible. It decides
    which cells respond before the noised set does, and sets become like the mean population.
    """
    found = {energy: optimal_spread(energy, 30) for energy in (0, 1, 4)}
    print(f"\nspread of set means and shares by energy_weight: {found}")  # noqa: T201
    np.testing.assert_allclose(found[0], 1, atol=0.15)
    assert found[4][1] < found[1][1] < found[0][1] - 0.05


def test_one_step_is_the_mean_population_again_and_again():
    """Nothing is known of pure noise, so that the best prediction of every set is the same."""
    found = [optimal_spread(energy, 1) for energy in (0, 1)]
    print(f"\nspread of set means and shares in one step: {found}")  # noqa: T201
    assert found[0][0] < 0.1  # of shares there is none to tell: all cells lie where the two kinds divide
    assert max(found[1]) < 0.1
