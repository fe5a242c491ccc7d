"""From cells to batches: nothing of a held-out time reaches training, and batch n depends on (seed, n) alone."""

from dataclasses import replace

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax.data.collate import make_batches, pad_populations
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import TimeSeriesSampling, time_series_rows
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutLast, HoldOutNone, HoldOutTimes
from scjax.data.timeseries import prepare_time_series, solver_times

SPEC = DataSpec(space="counts", time="day", cell_type="kind")
SIZES = {0.0: 12, 2.0: 5, 4.0: 9, 7.0: 6}
HELD_OUT = HoldOutTimes(times=(4.0,))
STEPS = Preprocess(n_top_genes=12, n_components=3)


def make_adata(seed=0):
    rng = np.random.default_rng(seed)
    day = rng.permutation(np.repeat(list(SIZES), list(SIZES.values())))
    x = rng.poisson(rng.gamma(2.0, 3.0, (len(day), 20))) + (np.arange(20) == 0)
    obs = pd.DataFrame(
        {"day": day, "kind": np.where(day > 3, "late", "early")}, index=[f"c{i}" for i in range(len(day))]
    )
    return anndata.AnnData(x.astype(np.int32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)]))


@pytest.fixture(scope="module")
def adata():
    return make_adata()


@pytest.fixture(scope="module")
def data(adata):
    return prepare_time_series(adata, SPEC, HELD_OUT, STEPS)


def test_every_cell_is_where_its_time_says(adata, data):
    assert data.times == (0.0, 2.0, 4.0, 7.0)
    assert [len(r) for r in data.rows] == list(SIZES.values())
    np.testing.assert_array_equal(np.sort(np.concatenate(data.rows)), np.arange(adata.n_obs))
    for time, rows in zip(data.times, data.rows, strict=True):
        assert (adata.obs["day"].to_numpy()[rows] == time).all()
        np.testing.assert_array_equal(data.population(time), data.latent[rows])
    np.testing.assert_array_equal(data.latent, data.transform.apply(adata.X, adata.var_names))
    assert data.n_dims == 3
    assert data.cell_types == ("early", "late")
    assert [data.cell_types[c] for c in data.cell_type] == list(adata.obs["kind"])
    with pytest.raises(ValueError, match=r"time must be one of 0.0, 2.0, 4.0, 7.0; got 3.0"):
        data.population(3.0)


def test_held_out_cells_do_not_touch_the_transform(adata, data):
    changed = adata.copy()
    held_out = (adata.obs["day"] == 4.0).to_numpy()
    changed.X[held_out] = changed.X[held_out][:, ::-1] * 7 + 1
    other = prepare_time_series(changed, SPEC, HELD_OUT, STEPS)
    assert other.transform.feature_names == data.transform.feature_names
    for name in ("mean", "std", "components", "explained_variance"):
        np.testing.assert_array_equal(getattr(other.transform, name), getattr(data.transform, name))
    np.testing.assert_array_equal(other.latent[~held_out], data.latent[~held_out])
    assert np.abs(other.latent[held_out] - data.latent[held_out]).max() > 0.1


def test_training_cells_do_touch_the_transform(adata, data):
    changed = adata.copy()
    changed.X[(adata.obs["day"] == 2.0).to_numpy()] += 5
    other = prepare_time_series(changed, SPEC, HELD_OUT, STEPS)
    assert np.abs(other.transform.mean - data.transform.mean).max() > 1e-3


def test_batches_hold_training_times_only(data):
    batch_at = make_batches(data, TimeSeriesSampling(n_cells=8), seed=0)
    for step in range(5):
        batch = batch_at(step)
        assert batch.ts == (0.0, 2.0, 7.0)
        assert batch.x0.shape == (8, 3)
        assert set(map(bytes, batch.x0)) <= set(map(bytes, data.population(0.0)))
        for target, time in zip(batch.targets, (2.0, 7.0), strict=True):
            assert set(map(bytes, target)) == set(map(bytes, data.population(time)))


def test_of_a_batch_a_host_reads_its_cells_alone(data):
    """Targets that are the same at each step are gathered once, whole."""
    half = lambda shape: (slice(2, 4), *map(slice, shape[1:]))  # noqa: E731
    drawn, fixed = (make_batches(data, TimeSeriesSampling(n_cells=8, n_targets=n), seed=0) for n in (4, None))
    whole, part = drawn(3), drawn(3, half)
    np.testing.assert_array_equal(part.x0[2:4], whole.x0[2:4])
    assert not part.x0[:2].any()
    assert not part.x0[4:].any()
    one_time = drawn(3, lambda shape: (slice(1, 2), *map(slice, shape[1:])))
    np.testing.assert_array_equal(one_time.targets[1], whole.targets[1])
    assert not one_time.targets[0].any()
    assert fixed(3, half).targets is fixed(3).targets


def test_index_time_counts_held_out_times(adata):
    data = prepare_time_series(adata, SPEC, HELD_OUT, STEPS, time_scale="index")
    assert make_batches(data, TimeSeriesSampling(n_cells=4), seed=0)(0).ts == (0.0, 1.0, 3.0)
    assert data.solver_times((4.0, 7.0)) == (2.0, 3.0)
    assert data.times == (0.0, 2.0, 4.0, 7.0)


def test_solver_times():
    assert solver_times((0.5, 3.0), (0.0, 3.0), "real", (0.0, 3.0)) == (0.5, 3.0)
    assert solver_times((2.0, 5.0, 26.0), (2.0, 5.0, 10.0, 26.0), "mean_gap", (2.0, 10.0, 26.0)) == (0.0, 0.25, 2.0)
    with pytest.raises(ValueError, match=r"observed ones .* got \[0.5\]"):
        solver_times((0.5, 3.0), (0.0, 3.0), "index", (0.0, 3.0))
    with pytest.raises(ValueError, match="increase strictly"):
        solver_times((3.0, 0.5), (0.0, 3.0), "real", (0.0, 3.0))


def test_the_mean_gap_is_that_between_training_times(adata):
    """Days 0, 2, 7 are seen: 1 is 3.5 days, and weeks in place of days change nothing."""
    data = prepare_time_series(adata, SPEC, HELD_OUT, STEPS, time_scale="mean_gap")
    assert data.solver_times(data.times) == (0.0, 2 / 3.5, 4 / 3.5, 2.0)
    weeks = adata.copy()
    weeks.obs["day"] = weeks.obs["day"] / 7 + 1
    rule = HoldOutTimes(times=(4.0 / 7 + 1,))
    other = prepare_time_series(weeks, SPEC, rule, STEPS, time_scale="mean_gap")
    np.testing.assert_allclose(other.solver_times(other.times), data.solver_times(data.times), rtol=1e-6)


@pytest.mark.parametrize("rule", [HELD_OUT, HoldOutNone(), HoldOutLast(n_times=1)])
@pytest.mark.parametrize("n_targets", [None, 7])
def test_padding_has_no_mass_and_moves_nothing(adata, rule, n_targets):
    data = prepare_time_series(adata, SPEC, rule, STEPS)
    batch = make_batches(data, TimeSeriesSampling(n_cells=6, n_targets=n_targets), seed=1)(3)
    np.testing.assert_allclose(batch.weights.sum(1), 1, rtol=1e-6)
    assert batch.weights.dtype == batch.targets.dtype == batch.x0.dtype == np.float32
    for target, weights, time in zip(batch.targets, batch.weights, batch.ts[1:], strict=True):
        population = data.population(time)
        assert set(map(bytes, target)) <= set(map(bytes, population))  # padding too is a cell of this time
        if n_targets is None:
            assert (weights > 0).sum() == len(population)
            np.testing.assert_allclose(weights @ target, population.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(target.max(0), population.max(0))
        else:
            assert target.shape == (7, 3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_padding_of_any_sizes(sizes, seed):
    latent = np.random.default_rng(seed).normal(size=(sum(sizes), 2)).astype(np.float32)
    rows = tuple(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))
    targets, weights = pad_populations(latent, rows)
    assert targets.shape == (len(sizes), max(sizes), 2)
    for target, weight, own in zip(targets, weights, rows, strict=True):
        np.testing.assert_array_equal(target[weight > 0], latent[own])
        np.testing.assert_allclose(weight.sum(), 1, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 20))
def test_rows_are_a_function_of_seed_and_step(seed, step, n_cells):
    populations = (np.arange(12), np.arange(12, 17), np.arange(17, 30))
    sampling = TimeSeriesSampling(n_cells=n_cells, n_targets=8)
    rows = time_series_rows(populations, sampling, seed=seed, step=step)
    time_series_rows(populations, sampling, seed=seed, step=step + 1)  # another call in between changes nothing
    again = time_series_rows(populations, sampling, seed=seed, step=step)
    np.testing.assert_array_equal(rows.start, again.start)
    for one, other, population in zip(rows.targets, again.targets, populations[1:], strict=True):
        np.testing.assert_array_equal(one, other)
        assert set(one) <= set(population)
        assert len(set(one)) == 8 or len(population) < 8  # without replacement where there are enough
    assert len(rows.start) == n_cells
    assert len(set(rows.start)) == n_cells or n_cells > 12


def test_steps_and_seeds_differ():
    populations = (np.arange(100), np.arange(100, 200))
    sampling = TimeSeriesSampling(n_cells=20)
    drawn = {tuple(time_series_rows(populations, sampling, seed=s, step=n).start) for s in range(3) for n in range(3)}
    assert len(drawn) == 9


def test_every_cell_of_the_start_is_drawn_equally_often():
    populations = (np.arange(10), np.arange(10, 12))
    n_steps = 2000
    drawn = [time_series_rows(populations, TimeSeriesSampling(n_cells=5), seed=0, step=n).start for n in range(n_steps)]
    share = np.bincount(np.concatenate(drawn), minlength=10) / n_steps
    assert np.abs(share - 0.5).max() < 4.5 * np.sqrt(0.25 / n_steps)  # binomial standard errors


def test_shapes_are_static_and_full_targets_are_not_copied(data):
    batch_at = make_batches(data, TimeSeriesSampling(n_cells=8), seed=0)
    one, other = batch_at(0), batch_at(17)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, other)
    assert one.targets is other.targets


def test_self_transport_travels_with_full_populations_only(data):
    own = np.array([0.5, 0.25])
    batch = make_batches(data, TimeSeriesSampling(n_cells=4), 0, own)(0)
    np.testing.assert_array_equal(batch.self_transport, own)
    with pytest.raises(ValueError, match=r"self_transport must have shape \(2,\), one a later time; got \(3,\)"):
        make_batches(data, TimeSeriesSampling(n_cells=4), 0, np.zeros(3))
    with pytest.raises(ValueError, match="n_targets=5 draws others"):
        make_batches(data, TimeSeriesSampling(n_cells=4, n_targets=5), 0, own)


def test_bad_input(adata):
    with pytest.raises(ValueError, match="Did you mean 'day'"):
        prepare_time_series(adata, replace(SPEC, time="days"), HELD_OUT, STEPS)
    with pytest.raises(ValueError, match="n_cells must be at least 1"):
        TimeSeriesSampling(n_cells=0)
    with pytest.raises(ValueError, match="n_targets must be at least 1"):
        TimeSeriesSampling(n_targets=0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        time_series_rows((np.arange(3), np.arange(3)), TimeSeriesSampling(), seed=-1, step=0)
