"""scDFM on worlds whose answers are known, from an AnnData through a checkpoint to generated cells.

Gaussian shifts: the cells of each condition have the mean and the covariance that they should have. Additive effects
and epistasis: held-out doubles are told better than by adding up where the training doubles tell how, and nowhere else.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from scjax.data.preprocess import Preprocess
from scjax.data.sampling import PairedSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutConditions, HoldOutNone
from scjax.data.synthetic import AdditiveEpistasis, GaussianShifts
from scjax.experiment import PerturbationExperiment, train
from scjax.metrics.perturbation_baselines import fit_baselines
from scjax.models import scdfm
from scjax.predict import GenerationConfig, load
from scjax.predict.perturbation import generate, read_sources
from scjax.train.optimizers import OptimizerConfig
from scjax.types import Population

pytestmark = pytest.mark.optimised  # hundreds of steps

SPEC = DataSpec(space="lognormalised", perturbation="perturbation")
TINY = scdfm.Config(d_model=32, n_layers=1, n_heads=2, graph_heads=2, dropout=0.0, gamma=0.0)
EXPERIMENT = PerturbationExperiment(
    model=TINY,
    spec=SPEC,
    split=HoldOutNone(),
    preprocess=Preprocess(library_size=None, log1p=False, scale=False, n_components=None),
    sampling=PairedSampling(n_populations=4, n_cells=64, n_genes=None, include_control=True),
    generation=GenerationConfig(n_cells=1000, solver="tsit5"),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", clip_norm=1.0),
    n_steps=2000,
    scan_steps=50,
    ema_decay=0.995,
    log_every=500,
)


def population_of(condition):
    return Population(() if condition == "control" else tuple(condition.split("+")))


def generated(trained, adata, conditions, **generation):
    """Cells of each condition, in float64; conditions have noise of their own."""
    settings = replace(trained.generation, **generation)
    sources = read_sources(trained, adata)
    populations = [population_of(condition) for condition in conditions]
    found, _ = generate(trained, sources, populations, generation=settings, chunk=250)
    return {c: found[p].x.astype(np.float64) for c, p in zip(conditions, populations, strict=True)}


# ---------------------------------------------------------------- Gaussian shifts


def deviations(x, mean, covariance):
    """Of the sample's mean and covariance from the true ones, entry by entry, in standard errors of a sample of so many
    independent cells: sqrt(S_ii / n), and sqrt((S_ii S_jj + S_ij^2) / (n - 1)) for Gaussians.
    """
    n, variance = len(x), np.diag(covariance)
    of_mean = (x.mean(0) - mean) / np.sqrt(variance / n)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / (n - 1))
    return of_mean, (np.cov(x.T) - covariance) / error


def generated_gaussians(world, experiment, folder):
    """Generated cells of each condition. Those of training are four times as many: what training cannot know is half a
    standard error of the generated ones.
    """
    adata = world.simulate(seed=1, n_cells=4 * experiment.generation.n_cells).to_anndata()
    train(experiment, adata, folder)
    return generated(load(folder), adata, world.conditions)


def largest_deviation(world, cells):
    """Over all means and (co)variances of all conditions, in standard errors.

    Of 4 conditions on 4 genes, 16 means and 40 (co)variances, it is 2.4 for real cells in the median, and above 4 in
    one draw of 200 (1000 cells each, 4000 draws).
    """
    worst = []
    for condition, x in cells.items():
        found = deviations(x, world.mean(condition), world.covariance(condition))
        worst.append([np.abs(z).max() for z in found])
        error, ratio = x.mean(0) - world.mean(condition), np.var(x, axis=0) / np.diag(world.covariance(condition))
        print(f"\n{condition}: worst mean and covariance {np.round(worst[-1], 2)} standard errors")  # noqa: T201
        print(f"error of the mean {error.round(3)}, ratio of the variances {ratio.round(2)}")  # noqa: T201
    return np.max(worst)


def assert_that_wrong_cells_would_fail(world, cells):
    """Cells of another condition, and genes that do not know of each other, are far beyond 4."""
    first, second = world.conditions[1:3]
    of_mean, _ = deviations(cells[second], world.mean(first), world.covariance(first))
    assert np.abs(of_mean).max() > 8
    rng = np.random.default_rng(0)
    independent = np.stack([rng.permutation(column) for column in cells[first].T], axis=1)
    _, of_covariance = deviations(independent, world.mean(first), world.covariance(first))
    assert np.abs(of_covariance).max() > 8


def test_gaussian_of_each_condition(tmp_path):
    world = GaussianShifts(n_genes=3, n_perturbed=2)
    experiment = replace(
        EXPERIMENT,
        model=replace(TINY, fusion="differential_transformer"),
        sampling=replace(EXPERIMENT.sampling, n_populations=3),
        generation=replace(EXPERIMENT.generation, n_cells=500),
        n_steps=1000,
        ema_decay=0.99,
    )
    cells = generated_gaussians(world, experiment, tmp_path / "run")
    assert largest_deviation(world, cells) < 4
    assert_that_wrong_cells_would_fail(world, cells)


FOUR = GaussianShifts(n_genes=4, n_perturbed=3)


@pytest.fixture(scope="module")
def by_flow(tmp_path_factory):
    """Cells of `FOUR`, trained on the flow alone."""
    return generated_gaussians(FOUR, EXPERIMENT, tmp_path_factory.mktemp("flow") / "run")


@pytest.mark.slow
def test_gaussian_of_each_of_four_conditions(by_flow):
    assert largest_deviation(FOUR, by_flow) < 4
    assert_that_wrong_cells_would_fail(FOUR, by_flow)


@pytest.mark.slow
def test_gaussian_of_each_of_four_conditions_from_other_noise(tmp_path):
    assert largest_deviation(FOUR, generated_gaussians(FOUR, replace(EXPERIMENT, seed=1), tmp_path / "run")) < 4


def variance_with_mmd(covariance, gamma, n_times=50):
    """Total variance of generated cells over that of the data, for the affine velocity that minimises the whole loss.

    The endpoint in one step is a mean, with less variance than cells have. The MMD asks it for more, at the expense of
    the velocity. Along a principal axis of variance s^2, v = a(t) x has, up to a constant,

        flow(t) = a^2 sigma^2 - 2 a c,      sigma^2 = (1 - t)^2 + t^2 s^2,   c = t s^2 - (1 - t)
        Var x1_hat = (1 + (1 - t) a)^2 sigma^2,     Var x(1) = exp(2 int a dt)

    and E k of a Gaussian difference with variances v is prod_i (h^2 / (h^2 + v_i))^(1/2). gamma = 0: a = c / sigma^2.
    """
    variance, t = np.linalg.eigvalsh(covariance), ((np.arange(n_times) + 0.5) / n_times)[:, None]
    sigma2, c = (1 - t) ** 2 + t**2 * variance, t * variance - (1 - t)
    between = np.random.default_rng(0).standard_normal((100_000, len(variance))) * np.sqrt(2 * variance)
    h2 = jnp.array([0.5, 1.0, 2.0, 4.0]) * np.median(np.sum(between**2, axis=1))

    def kernel(v):
        h2_ = h2.reshape(-1, *[1] * v.ndim)
        return jnp.mean(jnp.prod(h2_ / (h2_ + v[None]), axis=-1) ** 0.5)

    def objective(a):
        a = a.reshape(c.shape)
        of_endpoint = (1 + (1 - t) * a) ** 2 * sigma2
        mmd2 = kernel(of_endpoint[:, None] + of_endpoint[None]) - 2 * kernel(of_endpoint + variance[None])
        return jnp.mean(a**2 * sigma2 - 2 * a * c) + gamma * mmd2

    exact = c / sigma2
    best = minimize(jax.jit(jax.value_and_grad(objective)), exact.ravel(), jac=True, method="L-BFGS-B").x
    widened = np.exp(2 * (best.reshape(c.shape) - exact).mean(0))
    return widened @ variance / variance.sum()


@pytest.mark.slow
def test_mmd_widens_the_cells_as_its_minimum_says(by_flow, tmp_path):
    """The published weight 0.5 is no neutral choice: 8 % more variance in this world, and means as before.

    Both runs see the same batches and the same noise, so that the ratio is free of most of it.
    """
    cells = generated_gaussians(FOUR, replace(EXPERIMENT, model=replace(TINY, gamma=0.5)), tmp_path / "run")
    largest_deviation(FOUR, cells)
    for condition, x in cells.items():
        assert np.abs(deviations(x, FOUR.mean(condition), FOUR.covariance(condition))[0]).max() < 4
    total = [np.mean([x.var(axis=0).sum() for x in some.values()]) for some in (cells, by_flow)]
    with jax.enable_x64(True):
        expected = variance_with_mmd(FOUR.covariance(), 0.5)
    print(f"\nratio of the variances with and without MMD: {total[0] / total[1]:.3f}, expected {expected:.3f}")  # noqa: T201
    assert 1.06 < expected < 1.1
    assert abs(total[0] / total[1] - expected) < 0.03


# ---------------------------------------------------------------- additive effects and epistasis

N_HELD_OUT = 12  # of 45 doubles
KINDS = ("none", "learnable", "random")


def errors_on_held_out_doubles(kind, folder):
    """For each way to predict: the distance of the predicted mean from the true one, in each of the held-out doubles.

    "additive" adds up the mean effects of the training singles, "joint" is the network told of both perturbations,
    "composed" the control's velocity and what each perturbation alone adds to it.
    """
    world = AdditiveEpistasis(epistasis=kind, n_genes=10, n_perturbed=10)
    doubles = [c for c in world.conditions if "+" in c]
    held_out = tuple(np.random.default_rng(3).permutation(doubles)[:N_HELD_OUT].tolist())
    adata = world.simulate(seed=1, n_cells=200).to_anndata()
    experiment = replace(
        EXPERIMENT,
        model=replace(TINY, fusion="differential_transformer", perturbation="table"),
        split=HoldOutConditions(conditions=held_out),
        sampling=replace(EXPERIMENT.sampling, n_populations=8, n_cells=12),
        generation=GenerationConfig(n_cells=1000, n_steps=8),
        n_steps=1600,
    )
    run = train(experiment, adata, folder)
    assert set(run.data.split.test) == set(map(population_of, held_out))
    controls = run.data.controls().mean(0)
    baselines = fit_baselines({p: run.data.cells(p) for p in run.data.split.train})
    trained = load(folder)
    means = {
        "additive": {c: controls + baselines.predict(population_of(c))["additive"].delta for c in held_out},
        "joint": mean_of_each(generated(trained, adata, held_out)),
        "composed": mean_of_each(generated(trained, adata, held_out, composition="additive")),
    }
    errors = {
        way: np.array([np.linalg.norm(m - world.mean(c)) for c, m in found.items()]) for way, found in means.items()
    }
    for way, error in errors.items():
        print(f"\n{kind}, {way}: mean {error.mean():.3f}; {error.round(2)}")  # noqa: T201
    return errors


def mean_of_each(cells):
    return {condition: x.mean(0) for condition, x in cells.items()}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Of each kind of epistasis; trained once."""
    return {kind: errors_on_held_out_doubles(kind, tmp_path_factory.mktemp(kind) / "run") for kind in KINDS}


@pytest.mark.slow
def test_epistasis_that_can_be_learned_is_learned(errors):
    """All interactions have length 1, which is what adding up misses. Composed of its parts, a double misses most too.

    How much is a matter of rounding, which training magnifies: 0.766 and 0.795 of it on one machine, with the
    optimisations of LLVM and without, above 0.8 on another. Told of both perturbations the network misses 0.49.
    """
    found = errors["learnable"]
    assert found["joint"].mean() < 0.7 * found["additive"].mean()
    assert np.sum(found["joint"] < found["additive"]) >= N_HELD_OUT - 2  # by chance: once in 50
    assert 0.7 < found["composed"].mean() / found["additive"].mean() < 1.1
    assert found["joint"].mean() < 0.75 * found["composed"].mean()


@pytest.mark.slow
def test_without_epistasis_composing_adds_up(errors):
    """A double moves the cells by sqrt(2) on average. Adding up is right and misses by the noise of its means alone.

    The velocity towards a Gaussian is linear in its mean, so that adding up velocities adds up effects. The network
    told of both perturbations has to learn that from 33 doubles; it is better than no prediction, and worse than this.
    """
    found = errors["none"]
    assert found["composed"].mean() < found["additive"].mean() + 0.1
    assert found["composed"].max() < 0.3
    assert found["composed"].mean() < found["joint"].mean() < 0.5


@pytest.mark.slow
def test_no_method_learns_random_epistasis(errors):
    """Interactions that nothing tells: adding up misses all of their length 1; a model that is better has seen them.

    A made-up interaction of the same length would give sqrt(2).
    """
    found = errors["random"]
    assert 0.85 < found["composed"].mean() / found["additive"].mean() < 1.1
    assert 0.85 < found["joint"].mean() / found["additive"].mean() < 1.4
