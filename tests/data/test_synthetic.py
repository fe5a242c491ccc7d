"""The known answers are true: moments, kernels, equivariance, and what a drift of one cell cannot express."""

import numpy as np
import pytest

from scjax.data.preprocess import preprocess_for
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutTimes
from scjax.data.synthetic import GaussianShift, InteractingParticles, OrnsteinUhlenbeck, to_anndata
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
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
