"""Runs in one program: each is the run that it would be alone, and what befalls one is no matter to the others."""

import os
import signal
from functools import partial

import jax
import numpy as np
import pytest
import regression
from test_loop import Record, Terminated

from scjax.train.ensemble import fit_together
from scjax.train.loop import Interrupted, NonFiniteError, fit
from scjax.train.optimizers import make_optimizer

N_RUNS = 3
KEYS = [jax.random.key(r) for r in range(N_RUNS)]
SETTINGS = {"scan_steps": 5, "ema_decay": 0.9, "log_every": 4, "checkpoint_every": 10}


def params_of(r):
    return jax.tree.map(lambda leaf: leaf * (1 + r), regression.params())


def batch_of(r, n):
    return jax.tree.map(lambda leaf: leaf + np.float32(0.1 * r), regression.batch_at(n))


BATCHES = [partial(batch_of, r) for r in range(N_RUNS)]


def alone(r, n_steps=20, **options):
    tx = make_optimizer(regression.CONFIG, 20)
    options = {"batches": BATCHES[r], **SETTINGS, **options}
    return fit(regression.loss, params_of(r), tx, options.pop("batches"), key=KEYS[r], n_steps=n_steps, **options)


def together(n_steps=20, **options):
    tx = make_optimizer(regression.CONFIG, 20)
    options = {"batches": BATCHES, **SETTINGS, **options}
    params = [params_of(r) for r in range(N_RUNS)]
    return fit_together(regression.loss, params, tx, options.pop("batches"), keys=KEYS, n_steps=n_steps, **options)


def assert_close(state, wanted):
    """Up to rounding; keys and steps exactly."""
    assert int(state.step) == int(wanted.step)
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(wanted.key))
    state, wanted = (s._replace(key=None) for s in (state, wanted))
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state, wanted)


@pytest.fixture(scope="module")
def runs():
    """Each run alone, with what its hooks were told."""
    records = [Record() for _ in range(N_RUNS)]
    return [alone(r, hooks=[record]) for r, record in enumerate(records)], records


def test_each_run_is_the_one_that_it_is_alone(runs):
    records, group = [Record() for _ in range(N_RUNS)], Record()
    members = together(hooks=[[record] for record in records], group_hooks=[group])
    for member, wanted, record, told in zip(members, runs[0], records, runs[1], strict=True):
        assert member.error is None
        assert_close(member.state, wanted)
        assert [entry[0] for entry in record.told] == [entry[0] for entry in told.told]
        assert record.of("checkpoint") == told.of("checkpoint") == [(10,), (20,)]
        for (step, metrics), (wanted_step, values) in zip(record.of("log"), told.of("log"), strict=True):
            assert (step, list(metrics)) == (wanted_step, list(values))
            np.testing.assert_allclose(list(metrics.values()), list(values.values()), rtol=1e-4)
    step, metrics = group.of("log")[-1]
    mean = np.mean([record.of("log")[-1][1]["loss"] for record in records])
    assert step == 20
    assert metrics["loss"] == pytest.approx(mean)


@pytest.mark.parametrize("at", [7, 12])
def test_a_number_that_is_not_finite_stops_its_run_alone(runs, at):
    def spoiled(n):
        batch = batch_of(1, n)
        return {**batch, "y": batch["y"] * np.float32("nan")} if n == at else batch

    records, failures = [Record() for _ in range(N_RUNS)], []

    def on_failure(number, error):
        failures.append((number, error, len(records[0].of("log"))))

    batches, hooks = [BATCHES[0], spoiled, BATCHES[2]], [[record] for record in records]
    members = together(batches=batches, hooks=hooks, on_failure=on_failure)
    for r in (0, 2):
        assert members[r].error is None
        assert_close(members[r].state, runs[0][r])
    error = members[1].error
    assert isinstance(error, NonFiniteError)
    assert failures == [(1, error, {7: 2, 12: 3}[at])]  # while the others go on
    assert (error.step, error.term) == (at, "mse")
    assert_close(members[1].state, alone(1, n_steps=at))
    assert_close(error.state, members[1].state)
    assert records[1].of("checkpoint") == ([(10,)] if at > 10 else [])
    assert [step for step, _ in records[1].of("log")] == [step for step in (4, 8, 12) if step <= at]
    assert records[1].told[-1] == ("end",)
    assert [("finish",) in record.told for record in records] == [True, False, True]


def test_parameters_that_cannot_be_saved_stop_their_run_alone(runs):
    """As `SaveCheckpoints` refuses them."""

    class Refuses(Record):
        def on_checkpoint(self, state):
            raise NonFiniteError("no", step=int(state.step), term="parameters", metrics={}, state=state, saved=None)

    failures = []
    hooks = [[], [Refuses()], []]
    members = together(hooks=hooks, on_failure=lambda *told: failures.append(told))
    assert [member.error and member.error.step for member in members] == [None, 10, None]
    assert failures == [(1, members[1].error)]
    assert [int(member.state.step) for member in members] == [20, 10, 20]
    for r in (0, 2):
        assert_close(members[r].state, runs[0][r])


def test_runs_go_on_from_wherever_they_are(runs):
    """From steps 10, 0 and 20: one waits, one begins, one is done and is told nothing."""
    records = [Record() for _ in range(N_RUNS)]
    states = [alone(0, n_steps=10), None, runs[0][2]]
    members = together(states=states, hooks=[[record] for record in records])
    for member, wanted in zip(members, runs[0], strict=True):
        assert_close(member.state, wanted)
    assert records[0].of("start") == [(10, 20)]
    assert [step for step, _ in records[0].of("log")] == [12, 16, 20]
    assert records[0].of("checkpoint") == [(20,)]
    assert records[2].told == []
    assert [int(member.state.step) for member in together(states=runs[0])] == [20, 20, 20]  # nothing left to do


def test_each_run_has_its_own_patience_and_keeps_its_best():
    """The score of run 0 falls throughout, that of run 1 rises from the start; run 2's is infinite at step 15."""

    def score(r, params):
        steps = float(np.abs(np.asarray(params["w"]) - np.asarray(params_of(r)["w"])).sum())
        return {"loss": [-steps, steps, np.inf if calls[2] == 3 else -steps][r]}

    calls = [0] * N_RUNS

    def validate(r, params):
        calls[r] += 1
        return score(r, params)

    options = {"validate_every": 5, "patience": 2}
    members = together(validate=[partial(validate, r) for r in range(N_RUNS)], **options)
    assert [int(m.state.step) for m in members] == [20, 15, 15]
    assert [int(m.state.best.step) for m in members] == [20, 5, 10]
    assert members[2].error.term == "validation_loss"
    assert members[1].error is None
    calls[:] = [0] * N_RUNS
    assert_close(members[1].state, alone(1, validate=partial(validate, 1), **options))


def test_sigterm_saves_every_run():
    def batches(n):
        if n == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(0, n)

    records = [Record() for _ in range(N_RUNS)]
    with pytest.raises(Interrupted) as caught:
        together(batches=[batches, *BATCHES[1:]], hooks=[[record] for record in records])
    assert caught.value.step == 5
    assert [record.of("checkpoint") for record in records] == [[(5,)]] * N_RUNS


def test_sigterm_at_the_very_end_is_not_forgotten():
    with pytest.raises(Interrupted) as caught:
        together(group_hooks=[Terminated("on_end")])
    assert caught.value.step == 20


def test_one_compilation():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return regression.loss(params, batch, key)

    def traced(n_steps):
        traces.clear()
        tx = make_optimizer(regression.CONFIG, 20)
        fit_together(
            counted, [params_of(0), params_of(1)], tx, BATCHES[:2], keys=KEYS[:2], n_steps=n_steps, scan_steps=5
        )
        return len(traces)

    assert traced(19) == traced(5)


def test_as_many_of_everything_as_runs():
    with pytest.raises(ValueError, match=r"batches must hold one for each of the 3 runs in params; it holds 2\."):
        together(batches=BATCHES[:2])
    with pytest.raises(ValueError, match="hooks must hold one for each"):
        together(hooks=[[]])
    with pytest.raises(ValueError, match="n_steps must be at least the 10 steps that run 0 has done"):
        together(n_steps=5, states=[alone(0, n_steps=10), None, None])
