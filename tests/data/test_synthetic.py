"""The known answers are true: moments, kernels, equivariance, and what a drift of one cell cannot express."""

import numpy as np
import pytest

from scjax.data.perturbation import prepare_perturbation
from scjax.data.preprocess import Preprocess, preprocess_for
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutConditions, HoldOutTimes
from scjax.data.synthetic import (
    AdditiveEpistasis,
    GaussianPopulations,
    GaussianShift,
    GaussianShifts,
    InteractingParticles,
    OrnsteinUhlenbeck,
    VaryingMixtures,
    to_anndata,
)
from scjax.data.timeseries import prepare_time_series

WORLD = InteractingParticles()
TIMES = (0.0, 1.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def snapshots():
    return WORLD.simulate(TIMES, seed=0)


def test_kernel_sums_to_one_leaves_out_self_and_listens_to_senders(snapshots):
    x = snapshots.at(1.0)
    a = WORLD.kernel(x)
    np.testing.assert_allclose(a.sum(1), 1)
    assert (np.diag(a) == 0).all()
    heard = a.sum(0)
    sender = snapshots.kind[snapshots.time == 1.0] == "sender"
    assert heard[sender].min() > heard[~sender].max()
    assert a[:, sender].sum(1).min() > 0.99


def test_interaction_is_the_kernel_applied(snapshots):
    x = snapshots.at(2.0)
    expected = np.zeros_like(x)
    expected[:, 3] = WORLD.gain * WORLD.kernel(x) @ x[:, 0]
    np.testing.assert_allclose(WORLD.interaction(x), expected, atol=1e-9)
    np.testing.assert_array_equal(WORLD.drift(x), WORLD.intrinsic(x) + WORLD.interaction(x))
    np.testing.assert_array_equal(WORLD.interaction(x[:1]), 0)


def test_cells_have_no_order(snapshots):
    x = snapshots.at(1.0)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(WORLD.drift(x[order]), WORLD.drift(x)[order], atol=1e-12)


def test_mean_response_in_closed_form(snapshots):
    """Tolerance: 4 standard errors of the mean of 360 receivers, and of the 40 senders that all of them hear."""
    for time in TIMES:
        receivers = snapshots.at(time)[40:]
        swing = abs(WORLD.mean_response(time)) / WORLD.radius
        heard = np.hypot(WORLD.sender_spread, WORLD.sigma * np.sqrt(time)) * swing * np.sqrt(2 / 40)
        error = abs(receivers[:, 3].mean() - WORLD.mean_response(time))
        assert error < 4 * np.hypot(WORLD.spread / np.sqrt(360), heard)


def test_a_receiver_comes_through_one_state_with_both_velocities(snapshots):
    """At times 0 and 2 receivers are distributed alike, and are driven in opposite directions."""
    before, after = snapshots.at(0.0), snapshots.at(2.0)
    np.testing.assert_allclose(after[40:].mean(0), before[40:].mean(0), atol=0.45)
    np.testing.assert_allclose(WORLD.drift(before)[40:, 3].mean(), WORLD.gain * WORLD.radius, rtol=0.1)
    np.testing.assert_allclose(WORLD.drift(after)[40:, 3].mean(), -WORLD.gain * WORLD.radius, rtol=0.1)


def test_without_senders_no_response_turns_back():
    """Nobody turns, so without noise every velocity stays what it was."""
    quiet = InteractingParticles(sigma=0.0)
    start = quiet.start(np.random.default_rng([5, 1]), n_senders=0, n_receivers=200)
    later = quiet.simulate((0.0, 2.0), seed=5, n_senders=0, n_receivers=200).at(2.0)
    np.testing.assert_allclose(later, start + 2.0 * quiet.drift(start), atol=0.02)
    assert np.abs(later - start)[:, 3].min() > 0.2
    assert quiet.mean_response(1.0, n_senders=0) == 0  # on average over populations


def test_snapshots_are_of_different_cells_and_repeatable(snapshots):
    again = WORLD.simulate(TIMES, seed=0)
    np.testing.assert_array_equal(again.x, snapshots.x)
    assert np.abs(snapshots.at(1.0)[:, 2] - snapshots.at(2.0)[:, 2]).min() > 0  # a signal does not change: other cells
    assert np.abs(WORLD.simulate((0.0, 1.0), seed=1).x - snapshots.x[:800]).min() > 0


def test_step_length_is_fine_enough(snapshots):
    """Without noise, halving the step moves no cell by more than 1e-3 of a state unit."""
    quiet = InteractingParticles(sigma=0.0)
    coarse = quiet.simulate((0.0, 2.0), seed=0, n_senders=8, n_receivers=24)
    fine = quiet.simulate((0.0, 2.0), seed=0, n_senders=8, n_receivers=24, dt=0.005)
    np.testing.assert_allclose(coarse.x, fine.x, atol=1e-3)


def test_ornstein_uhlenbeck_moments():
    process = OrnsteinUhlenbeck(start=(2.0, -1.0), centre=0.5, rate=0.7, sigma=0.6, start_std=0.2)
    n = 20_000
    snapshots = process.simulate((0.0, 0.5, 30.0), seed=0, n_cells=n)
    for time in (0.0, 0.5, 30.0):
        x, covariance = snapshots.at(time), process.covariance(time)
        std = np.sqrt(covariance[0, 0])
        np.testing.assert_allclose(x.mean(0), process.mean(time), atol=4.5 * std / np.sqrt(n))
        np.testing.assert_allclose(np.cov(x.T), covariance, atol=4.5 * std**2 * np.sqrt(2 / n))
    np.testing.assert_allclose(process.mean(0.0), (2.0, -1.0))
    np.testing.assert_allclose(process.covariance(0.0), 0.04 * np.eye(2))
    np.testing.assert_allclose(process.covariance(30.0), 0.36 / 1.4 * np.eye(2))  # sigma^2 / 2 rate
    # d mean / dt is the drift at the mean
    slope = (process.mean(0.5 + 1e-6) - process.mean(0.5 - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, process.drift(process.mean(0.5)[None])[0], rtol=1e-6)


def test_gaussian_shift():
    process = GaussianShift(velocity=(3.0, 4.0), std=0.5)
    assert process.w2(1.0, 3.0) == pytest.approx(10.0)
    assert process.w2(3.0, 1.0) == process.w2(1.0, 3.0)
    snapshots = process.simulate((0.0, 2.0), seed=0, n_cells=5000)
    np.testing.assert_allclose(snapshots.at(2.0).mean(0), (6.0, 8.0), atol=4.5 * 0.5 / np.sqrt(5000))
    np.testing.assert_allclose(snapshots.at(2.0).std(0), 0.5, rtol=4.5 / np.sqrt(2 * 5000))


def test_to_anndata_is_read_by_the_pipeline(snapshots):
    spec = DataSpec(expression="obsm/latent", space="latent", time="time", cell_type="kind")
    data = prepare_time_series(to_anndata(snapshots), spec, HoldOutTimes(times=(2.0,)), preprocess_for("latent"))
    np.testing.assert_array_equal(data.population(2.0), snapshots.at(2.0).astype(np.float32))
    assert data.cell_types == ("receiver", "sender")


SHIFTED = [
    GaussianShifts(),
    GaussianShifts(correlation=-0.4, seed=3),
    AdditiveEpistasis(epistasis="none", n_perturbed=3),
    AdditiveEpistasis(epistasis="learnable", n_perturbed=4),
    AdditiveEpistasis(epistasis="random", n_perturbed=3),
]


@pytest.mark.parametrize("world", SHIFTED, ids=repr)
def test_moments_of_each_condition(world):
    """Within 4.5 standard errors; no cell is near zero."""
    n = 4000
    cells = world.simulate(seed=1, n_cells=n)
    assert cells.x.min() > 0
    for condition in world.conditions:
        x, covariance = cells.of(condition), world.covariance(condition)
        assert x.shape == (n, world.n_genes)
        std = np.sqrt(np.diag(covariance))
        np.testing.assert_array_less(np.abs(x.mean(0) - world.mean(condition)), 4.5 * std / np.sqrt(n))
        error = np.sqrt((np.outer(std, std) ** 2 + covariance**2) / n)
        np.testing.assert_array_less(np.abs(np.cov(x.T) - covariance), 4.5 * error)
    np.testing.assert_array_equal(world.mean("control"), np.full(world.n_genes, world.level))


@pytest.mark.parametrize("world", [SHIFTED[0], SHIFTED[3]], ids=repr)
def test_cells_of_a_condition_do_not_depend_on_the_others(world):
    cells = world.simulate(seed=1, n_cells=5)
    some = world.simulate(seed=1, n_cells=5, conditions=world.conditions[2:4])
    assert set(some.condition) == set(world.conditions[2:4])
    np.testing.assert_array_equal(some.of(world.conditions[3]), cells.of(world.conditions[3]))
    assert (world.simulate(seed=2, n_cells=5).x != cells.x).all()


def test_shifts_have_one_length_and_many_directions():
    world = GaussianShifts(n_genes=7, n_perturbed=5, length=1.2)
    assert world.conditions == ("control", "g0", "g1", "g2", "g3", "g4")
    shifts = np.array([world.shift(condition) for condition in world.conditions])
    np.testing.assert_allclose(np.linalg.norm(shifts, axis=1), [0, *[1.2] * 5])
    assert np.linalg.matrix_rank(shifts) == 5
    assert (GaussianShifts(seed=1).shift("g0") != GaussianShifts().shift("g0")).all()


def doubles(world):
    return [c for c in world.conditions if "+" in c]


def test_doubles_are_the_sum_of_singles_and_an_interaction():
    for kind in ("none", "learnable", "random"):
        world = AdditiveEpistasis(epistasis=kind)
        assert len(doubles(world)) == 45
        for double in doubles(world):
            a, b = (world.mean(name) - world.level for name in double.split("+"))
            np.testing.assert_allclose(world.additive(double), world.level + a + b)
            interaction = world.mean(double) - world.additive(double)
            np.testing.assert_allclose(interaction, world.interaction(double), atol=1e-12)
            np.testing.assert_allclose(np.linalg.norm(interaction), 0 if kind == "none" else 1)
        for single in ("control", "g00", "g09"):
            assert (world.interaction(single) == 0).all()
        assert np.linalg.norm(world.mean("g03") - world.level) == pytest.approx(1)
        np.testing.assert_array_equal(world.mean("g03"), AdditiveEpistasis(epistasis="none").mean("g03"))


def test_other_doubles_tell_a_learnable_interaction_and_not_a_random_one():
    """Predicted: the mean interaction of all other doubles whose genes are of the same two classes."""
    for kind, learnable in (("learnable", True), ("random", False)):
        world = AdditiveEpistasis(epistasis=kind, n_classes=3)
        assert np.bincount(world.classes()).tolist() == [4, 3, 3]
        pairs = {d: tuple(sorted(world.classes()[world.genes.index(g)] for g in d.split("+"))) for d in doubles(world)}
        assert len(set(pairs.values())) == 6
        missed = []
        for double, pair in pairs.items():
            others = [world.interaction(other) for other, p in pairs.items() if p == pair and other != double]
            missed.append(np.sum((np.mean(others, axis=0) - world.interaction(double)) ** 2))
        # zero, where adding up alone misses 1; an independent guess of n draws misses 1 + 1 / n
        if learnable:
            np.testing.assert_allclose(missed, 0, atol=1e-12)
        else:
            assert np.mean(missed) > 1


def test_perturbed_cells_as_anndata():
    cells = AdditiveEpistasis(epistasis="none", n_perturbed=2).simulate(seed=0, n_cells=3)
    adata = cells.to_anndata()
    np.testing.assert_array_equal(adata.X, cells.x.astype(np.float32))
    assert tuple(adata.var_names) == cells.genes
    assert adata.obs["perturbation"].tolist() == [c for c in ("control", "g00", "g01", "g00+g01") for _ in range(3)]
    assert adata.obs_names.is_unique
    spec = DataSpec(space="lognormalised", perturbation="perturbation")
    steps = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
    data = prepare_perturbation(adata, spec, HoldOutConditions(conditions=("g00+g01",)), steps)
    np.testing.assert_array_equal(data.x, adata.X)
    assert [p.condition for p in data.populations] == ["control", "g00", "g00+g01", "g01"]
    assert [p.condition for p in data.split.test] == ["g00+g01"]


def test_varying_mixtures_moments_of_set_means():
    """Within 4.5 standard errors: the mean of sets, and their covariance, along u, along v and elsewhere."""
    world, n, n_cells = VaryingMixtures(alpha=1.5, beta=3.0, n_genes=5), 5000, 7
    sets = world.simulate(seed=0, n_sets=n, n_cells=n_cells)
    means, covariance = sets.x.mean(1), world.set_mean_covariance(n_cells)
    std = np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(np.abs(means.mean(0) - world.mean()), 4.5 * std / np.sqrt(n))
    np.testing.assert_array_less(np.abs(np.cov(means.T) - covariance), 4.5 * np.outer(std, std) * np.sqrt(2 / n))
    u, v = world.directions()
    np.testing.assert_allclose(np.stack([u, v]) @ np.stack([u, v]).T, np.eye(2), atol=1e-12)
    many = world.set_mean_covariance(10**9)  # what differs between populations alone
    np.testing.assert_allclose([u @ many @ u, v @ many @ v], [4 * world.weight_moments()[1], 0.0625], rtol=1e-6)
    np.testing.assert_allclose(np.trace(many), u @ many @ u + v @ many @ v, rtol=1e-6)
    control = sets.control.reshape(-1, 5)
    np.testing.assert_allclose(control.mean(0), world.level, atol=4.5 * world.std / np.sqrt(len(control)))
    assert min(sets.x.min(), sets.control.min()) > 0


def test_varying_mixtures_weight_and_shift_are_read_off_the_cells():
    """Responders lie seven noise standard deviations from the others; the rest is counting."""
    world, n_cells = VaryingMixtures(), 400
    sets = world.simulate(seed=1, n_sets=500, n_cells=n_cells)
    weight, shift = world.weight(sets.x), world.shift(sets.x)
    np.testing.assert_allclose(weight, sets.hidden["weight"], atol=4.5 * 0.5 / np.sqrt(n_cells))
    np.testing.assert_allclose(shift, sets.hidden["shift"], atol=4.5 * world.std / np.sqrt(n_cells))
    mean, variance = world.weight_moments()
    hidden = sets.hidden["weight"]
    assert abs(hidden.mean() - mean) < 4.5 * np.sqrt(variance / 500)
    assert abs(hidden.var() - variance) < 4.5 * variance * np.sqrt(2 / 500)
    assert abs(np.corrcoef(weight, shift)[0, 1]) < 4.5 / np.sqrt(500)
    np.testing.assert_allclose(world.weight(sets.control), 0, atol=0.02)
    np.testing.assert_array_equal(world.simulate(seed=1, n_sets=500, n_cells=n_cells).x, sets.x)


def test_gaussian_populations_moments():
    world, n, n_cells = GaussianPopulations(), 4000, 3
    sets = world.simulate(seed=2, n_sets=n, n_cells=n_cells)
    assert sets.x.shape == sets.control.shape == (n, n_cells, 3)
    one_gene = sets.x[..., 1] - world.level - world.shift
    expected = world.between_std**2 + world.within_std**2 * np.eye(n_cells)
    np.testing.assert_allclose(one_gene.mean(), 0, atol=4.5 * np.sqrt(expected.mean() / n))
    np.testing.assert_allclose(np.cov(one_gene.T), expected, atol=4.5 * expected[0, 0] * np.sqrt(2 / n))
    assert abs(np.cov(sets.x[:, 0, 0], sets.x[:, 0, 1])[0, 1]) < 4.5 * expected[0, 0] / np.sqrt(n)  # genes are apart
    np.testing.assert_allclose(sets.hidden["mean"], sets.x.mean((1, 2)), atol=4.5 * world.within_std / 3)


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_best_guess_of_gaussian_populations_is_conditioning(shared):
    """All cells of a set and one gene as one Gaussian vector: E x_0 + Cov(x_0, x_t) Cov(x_t)^-1 (x_t - E x_t)."""
    world, n_cells, alpha_bar = GaussianPopulations(n_genes=2), 4, 0.6
    x_t = np.random.default_rng(0).normal(size=(3, n_cells, 2))
    signal = world.between_std**2 + world.within_std**2 * np.eye(n_cells)
    noise = shared + (1 - shared) * np.eye(n_cells)
    gain = np.sqrt(alpha_bar) * signal @ np.linalg.inv(alpha_bar * signal + (1 - alpha_bar) * noise)
    centre = world.level + world.shift
    expected = centre + np.einsum("ij,sjg->sig", gain, x_t - np.sqrt(alpha_bar) * centre)
    np.testing.assert_allclose(world.denoise(x_t, alpha_bar, shared=shared), expected, rtol=1e-10)
    np.testing.assert_allclose(world.denoise(x_t, 1.0), x_t)  # nothing to guess


def test_cell_sets_as_anndata():
    sets = VaryingMixtures(n_genes=2).simulate(seed=0, n_sets=3, n_cells=4)
    adata = sets.to_anndata()
    assert adata.shape == (24, 2)
    assert tuple(adata.var_names) == sets.genes
    assert adata.obs_names.is_unique
    of = lambda batch, what: adata[(adata.obs["batch"] == batch) & (adata.obs["perturbation"] == what)].X  # noqa: E731
    for i, batch in enumerate(("set-0000", "set-0001", "set-0002")):
        np.testing.assert_array_equal(of(batch, "stimulated"), sets.x[i].astype(np.float32))
        np.testing.assert_array_equal(of(batch, "control"), sets.control[i].astype(np.float32))
    spec = DataSpec(space="lognormalised", perturbation="perturbation", batch="batch")
    spec.check(adata)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InteractingParticles(n_dims=3), "n_dims must be at least 4"),
        (lambda: InteractingParticles(omega=1.0, level=0.0), "level must be a positive"),
        (lambda: WORLD.simulate((1.0, 0.5), seed=0), "increase strictly"),
        (lambda: WORLD.simulate((-1.0, 0.5), seed=0), "first of times must be zero or a positive"),
        (lambda: WORLD.simulate((0.0, 1.0), seed=0, n_senders=1, n_receivers=0), "number of cells must be at least 2"),
        (lambda: OrnsteinUhlenbeck(start=()), "coordinates in start"),
        (lambda: OrnsteinUhlenbeck(start=(0.0,), rate=0.0), "rate must be a positive"),
        (lambda: GaussianShift(velocity=(1.0,), std=-1.0), "std must be a positive"),
        (lambda: GaussianShifts(n_genes=3), "n_genes must be at least 4"),
        (lambda: GaussianShifts(correlation=1.0), "correlation must lie in"),
        (lambda: GaussianShifts(level=4.0), "level must be at least 4.5, so that no cell"),
        (lambda: GaussianShifts(length=0.0), "length must be a positive"),
        (lambda: GaussianShifts().mean("g7"), "one of this world's 5, .* got 'g7'"),
        (lambda: GaussianShifts().covariance("g7"), "one of this world's 5"),
        (lambda: GaussianShifts().simulate(seed=0, n_cells=0), "n_cells must be at least 1"),
        (lambda: GaussianShifts().simulate(seed=0, n_cells=1, conditions=("x",)), "got 'x'"),
        (lambda: VaryingMixtures(n_genes=1), "n_genes must be at least 2"),
        (lambda: VaryingMixtures(alpha=0.0), "alpha must be a positive"),
        (lambda: VaryingMixtures(level=4.0), "level must be at least 4.8"),
        (lambda: VaryingMixtures().simulate(seed=0, n_sets=0, n_cells=1), "n_sets must be at least 1"),
        (lambda: VaryingMixtures().set_mean_covariance(0), "n_cells must be at least 1"),
        (lambda: GaussianPopulations(within_std=0.0), "within_std must be a positive"),
        (lambda: GaussianPopulations(level=3.0), "level must be at least 3.4"),
        (lambda: GaussianPopulations().simulate(seed=0, n_sets=1, n_cells=0), "n_cells must be at least 1"),
        (lambda: AdditiveEpistasis(epistasis="none", n_perturbed=1), "n_perturbed must be at least 2"),
        (lambda: AdditiveEpistasis(epistasis="none", n_classes=0), "n_classes must be at least 1"),
        (lambda: AdditiveEpistasis(epistasis="none", std=0.6), "level must be at least 6.6"),
        (lambda: AdditiveEpistasis(epistasis="none").mean("g01+g00"), "in the order of the genes; got 'g01.g00'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
