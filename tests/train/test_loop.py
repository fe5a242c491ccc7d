import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regression

from scjax.checkpoint import CheckpointWriter, list_steps, read
from scjax.mesh import everywhere, make_mesh
from scjax.train.hooks import Hook, SaveCheckpoints
from scjax.train.loop import Interrupted, NonFiniteError, fit, in_order
from scjax.train.optimizers import make_optimizer
from scjax.train.state import init_state, state_form
from scjax.train.step import make_update

ROOT = Path(__file__).parents[2]


class Record(Hook):
    """All that a hook is told, in order."""

    def __init__(self):
        self.told = []

    def on_start(self, step, n_steps):
        self.told.append(("start", step, n_steps))

    def on_compiled(self, seconds):
        self.told.append(("compiled", seconds > 0))

    def on_log(self, step, metrics):
        self.told.append(("log", step, dict(metrics)))

    def on_checkpoint(self, state):
        self.told.append(("checkpoint", int(state.step)))

    def on_finish(self):
        self.told.append(("finish",))

    def on_end(self):
        self.told.append(("end",))

    def of(self, what):
        return [t[1:] for t in self.told if t[0] == what]


def process(*args: str, expect: int = 0) -> subprocess.CompletedProcess:
    """The regression as a program, in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("regression.py")), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def uninterrupted():
    record = Record()
    return regression.run(20, hooks=[record], log_every=4), record


def test_the_loop_is_the_update_repeated(uninterrupted):
    state, record = uninterrupted
    tx = make_optimizer(regression.CONFIG, 20)
    update = jax.jit(make_update(regression.loss, tx, ema_decay=0.9))
    want, seen = init_state(regression.params(), tx, regression.KEY, ema=True), []
    for n in range(20):
        want, metrics = update(want, regression.batch_at(n))
        seen.append(metrics)
    assert regression.bits(state) == regression.bits(want)
    assert [step for step, _ in record.of("log")] == [4, 8, 12, 16, 20]
    for step, metrics in record.of("log"):
        assert list(metrics) == ["loss", "decay", "mse", "grad_norm"]
        assert metrics == {name: float(seen[step - 1][name]) for name in metrics}


@pytest.mark.parametrize("scan_steps", [1, 3, 64])
def test_how_steps_are_grouped_changes_nothing(uninterrupted, scan_steps):
    """Groups of 3 end in one of 2, and 64 are more than the run has: no step is lost or made twice."""
    assert regression.bits(regression.run(20, scan_steps=scan_steps)) == regression.bits(uninterrupted[0])


def test_a_sparse_average_and_skipping_survive_a_checkpoint(tmp_path):
    """Averages after the steps 0, 4, 8, ...; a module unused in every other batch; stops at 7."""

    def loss(params, batch, key):
        value, terms = regression.loss(params, batch, key)
        return value + batch["used"] * jnp.sum(params["inner"]["null"] ** 2), terms

    def batches(n):
        return {**regression.batch_at(n), "used": np.float32(n % 2)}

    tx = make_optimizer(replace(regression.CONFIG, weight_decay=0.1, skip_unused=True), 20)
    params = {**regression.params(), "inner": {"null": jnp.ones((1, 3))}}
    settings = {"key": regression.KEY, "scan_steps": 3, "ema_decay": 0.9, "ema_every": 4, "ema_start": "first_step"}
    whole = fit(loss, params, tx, batches, n_steps=12, **settings)
    with CheckpointWriter(tmp_path, about={"run": "a"}) as writer:
        fit(loss, params, tx, batches, n_steps=7, **settings, hooks=[SaveCheckpoints(writer)])
    part = read(tmp_path, like={"state": state_form(params, tx, regression.KEY, ema=True)})
    part = part.arrays["state"]
    assert int(part.step) == 7
    rest = fit(loss, params, tx, batches, n_steps=12, **settings, state=part)
    assert regression.bits(rest) == regression.bits(whole)
    dense = fit(loss, params, tx, batches, n_steps=12, **{**settings, "ema_every": 1})
    assert regression.bits(dense.params) == regression.bits(whole.params)
    assert regression.bits(dense.ema) != regression.bits(whole.ema)


def test_one_compilation(uninterrupted):
    """The loss is traced as often for 17 calls, the last one short, as for one."""

    def traces(n_steps, scan_steps):
        count = 0

        def loss(*args):
            nonlocal count
            count += 1
            return regression.loss(*args)

        fit(loss, regression.params(), optax.sgd(0.1), regression.batch_at, key=regression.KEY, n_steps=n_steps,
            scan_steps=scan_steps)  # fmt: skip
        return count

    assert traces(50, 3) == traces(3, 3)


def test_hooks_hear_everything_in_order():
    record = Record()
    regression.run(12, hooks=[record], checkpoint_every=5, log_every=6)
    told = [t[:2] if t[0] == "log" else t for t in record.told]
    assert told == [
        ("start", 0, 12),
        ("compiled", True),
        ("checkpoint", 5),
        ("log", 6),
        ("checkpoint", 10),
        ("log", 12),
        ("checkpoint", 12),
        ("finish",),
        ("end",),
    ]


def test_the_caller_s_arrays_are_left_alone():
    params = regression.params()
    before = regression.bits(params)
    state = fit(regression.loss, params, optax.sgd(0.1), regression.batch_at, key=regression.KEY, n_steps=10)
    more = fit(
        regression.loss, params, optax.sgd(0.1), regression.batch_at, key=regression.KEY, n_steps=20, state=state
    )
    assert regression.bits(params) == before  # donated buffers would raise
    assert (int(state.step), int(more.step)) == (10, 20)


def test_a_state_that_is_given_away_is_not_copied(uninterrupted):
    """Nor are parameters needed beside it: their shapes tell what is expected."""
    state = regression.run(10)
    shapes = jax.eval_shape(regression.params)
    tx = make_optimizer(regression.CONFIG, 20)
    options = {"key": regression.KEY, "scan_steps": 5, "ema_decay": 0.9, "state": state, "donate_state": True}
    more = fit(regression.loss, shapes, tx, regression.batch_at, n_steps=20, **options)
    assert regression.bits(more) == regression.bits(uninterrupted[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))


def test_arrays_that_lie_on_the_mesh_already_are_left_alone():
    mesh = make_mesh(1)
    params = everywhere(regression.params(), mesh)
    before = regression.bits(params)
    options = {"key": regression.KEY, "scan_steps": 5, "ema_decay": 0.9, "mesh": mesh}
    state = fit(regression.loss, params, optax.sgd(0.1), regression.batch_at, n_steps=10, **options)
    fit(regression.loss, params, optax.sgd(0.1), regression.batch_at, n_steps=20, state=state, **options)
    assert regression.bits(params) == before
    assert int(state.step) == 10


def test_a_finished_run_is_not_run_again(uninterrupted):
    record = Record()
    state = regression.run(20, state=uninterrupted[0], hooks=[record])
    assert regression.bits(state) == regression.bits(uninterrupted[0])
    assert record.told == []


def test_stream_of_another_thread(uninterrupted):
    """A stream is asked for the same batches in the same groups, and closed, also from a start between groups."""
    asked, closed = [], []

    def stream(batches, start, stop, *, chunk):
        asked.append((start, stop, chunk))
        try:
            yield from in_order(batches, start, stop, chunk=chunk)
        finally:
            closed.append(start)

    early = regression.run(13, stream=stream)
    late = regression.run(20, stream=stream, state=early)
    assert asked == [(0, 13, 5), (13, 15, 5), (15, 20, 5)]
    assert closed == [0, 13, 15]
    assert regression.bits(late) == regression.bits(uninterrupted[0])
    with pytest.raises(ValueError, match="stream ended before step 10"):
        regression.run(20, stream=lambda b, start, stop, chunk: in_order(b, start, 10, chunk=chunk))
    with pytest.raises(ValueError, match="stream must yield 5 stacked batches here; got 4"):
        regression.run(20, stream=lambda b, start, stop, chunk: in_order(b, start, stop, chunk=4))


def test_non_finite_stops_with_step_term_and_checkpoint(tmp_path):
    def batches(n):
        batch = regression.batch_at(n)
        return {"x": batch["x"], "y": np.full_like(batch["y"], np.nan)} if n == 13 else batch

    record = Record()
    with CheckpointWriter(tmp_path, about={"run": "a"}) as writer, pytest.raises(NonFiniteError) as caught:
        regression.run(40, batches=batches, hooks=[SaveCheckpoints(writer), record], checkpoint_every=10, log_every=1)
    err = caught.value
    assert (err.step, err.term, err.saved.step, err.saved.directory) == (13, "mse", 10, tmp_path)
    assert re.match(r"mse is nan after 13 good steps, in the next one \(loss nan, decay [\d.]+, mse nan,", str(err))
    assert f"checkpoint: step 10 in {tmp_path}" in str(err)
    assert [step for step, _ in record.of("log")] == list(range(1, 14))
    assert record.told[-1] == ("end",)
    # Taken up from there it stops at the same place, and still knows the checkpoint.
    state = read(tmp_path, like={"state": regression.template()}).arrays["state"]
    with CheckpointWriter(tmp_path, about={"run": "a"}, resume_from=10) as writer:
        with pytest.raises(NonFiniteError, match="after 13 good steps.* checkpoint: step 10 in"):
            regression.run(40, batches=batches, hooks=[SaveCheckpoints(writer)], state=state)
    # The state is that of 13 steps on good batches, and every number in it is finite.
    assert regression.bits(err.state) == regression.bits(regression.run(13))
    assert list_steps(tmp_path) == (10,)


def test_resume_in_a_new_process_is_bit_exact(tmp_path, uninterrupted):
    """20 steps = 10, a checkpoint, another process, 10: parameters, average, Adam's moments, keys; and the log."""
    process(str(tmp_path), "10")
    process(str(tmp_path), "20", "--resume")
    step, arrays, about = read(tmp_path, like={"state": regression.template()})
    assert (step, about) == (20, {"run": "regression"})
    assert regression.bits(arrays["state"]) == regression.bits(uninterrupted[0])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 21, 2))


def test_sigterm_saves_and_says_where(tmp_path, uninterrupted):
    """The signal comes while batch 12 is made; the run stops at the end of a call, and goes on from there."""
    done = process(str(tmp_path), "20", "--terminate-at", "12", expect=1)
    (step,) = list_steps(tmp_path)
    assert step in (10, 15)
    assert re.search(rf"Stopped by SIGTERM after step {step}; step {step} is saved in {tmp_path}", done.stderr)
    assert "Traceback" not in done.stderr
    process(str(tmp_path), "20", "--resume")
    state = read(tmp_path, like={"state": regression.template()}).arrays["state"]
    assert regression.bits(state) == regression.bits(uninterrupted[0])
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(2, 21, 2))


def test_sigterm_restores_the_handler_and_needs_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)

    def batches(n):
        if n == 7:
            signal.raise_signal(signal.SIGTERM)
        return regression.batch_at(n)

    record = Record()
    with pytest.raises(Interrupted) as caught:
        regression.run(20, batches=batches, hooks=[record])
    assert caught.value.step in (5, 10)
    assert caught.value.saved is None  # this hook writes nothing
    assert record.told[-3:] == [("checkpoint", caught.value.step), ("finish",), ("end",)]
    assert signal.getsignal(signal.SIGTERM) == before
    regression.run(5)
    assert signal.getsignal(signal.SIGTERM) == before

    finished = []
    thread = threading.Thread(target=lambda: finished.append(regression.run(5)))
    thread.start()
    thread.join()
    assert int(finished[0].step) == 5


class Terminated(Hook):
    """Gets SIGTERM while it does what it is named for."""

    def __init__(self, when):
        setattr(self, when, lambda *told: signal.raise_signal(signal.SIGTERM))


@pytest.mark.parametrize("when", ["on_start", "on_checkpoint", "on_finish", "on_end"])
def test_sigterm_while_a_hook_works(when):
    """It completes what it does: a signal during the last write of a checkpoint does not break that. Nor is the signal
    forgotten: there may be another run to come.
    """
    record = Record()
    with pytest.raises(Interrupted) as caught:
        regression.run(10, hooks=[Terminated(when), record])
    assert caught.value.step == (0 if when == "on_start" else 10)
    assert record.told[-2:] == [("finish",), ("end",)]


def test_what_cannot_be_finished_ends_the_run():
    class Fails(Hook):
        def on_finish(self):
            raise OSError("the disk is full")

    record = Record()
    with pytest.raises(OSError, match="disk is full"):
        regression.run(10, hooks=[Fails(), record])
    assert record.told[-1] == ("end",)


def validation(scores):
    """Scores in order, whatever the parameters; remembers the parameters."""
    left, seen = list(scores), []

    def validate(params):
        seen.append(jax.tree.map(np.array, params))
        return {"w1": left.pop(0), "other": 7.0}

    return validate, seen


def test_early_stopping_keeps_the_best_parameters():
    record = Record()
    validate, seen = validation([3.0, 2.0, 2.0, 2.5, 1.0])
    state = regression.run(100, validate=validate, validate_every=10, patience=2, hooks=[record])
    assert (int(state.step), int(state.best.step), float(state.best.score)) == (40, 20, 2.0)
    jax.tree.map(np.testing.assert_array_equal, state.best.params, seen[1])
    scores = [m for _, m in record.of("log") if "validation_w1" in m]
    assert scores[1] == {"validation_w1": 2.0, "validation_other": 7.0}
    assert record.told[-3:] == [("checkpoint", 40), ("finish",), ("end",)]
    # It looks at the moving average, which the plain parameters are not.
    average = regression.run(10).ema
    jax.tree.map(np.testing.assert_array_equal, seen[0], average)
    # Taken up again, it is still out of patience.
    again = regression.run(100, validate=validate, validate_every=10, patience=2, state=state)
    assert int(again.step) == 40


def test_patience_survives_a_checkpoint(tmp_path):
    """One bad validation before the interruption and one after are two in a row."""
    validate, _ = validation([2.0, 2.5])
    with CheckpointWriter(tmp_path, about={"run": "a"}) as writer:
        regression.run(20, validate=validate, validate_every=10, patience=2, hooks=[SaveCheckpoints(writer)])
    state = read(tmp_path, like={"state": regression.template(best=True)}).arrays["state"]
    validate, _ = validation([2.5, 1.0])
    state = regression.run(100, validate=validate, validate_every=10, patience=2, state=state)
    assert (int(state.step), int(state.best.step)) == (30, 10)


def test_an_equal_score_is_no_better_one():
    """0.1 in double precision is less than the float32 of it that the state keeps."""
    validate, _ = validation([0.1] * 10)
    state = regression.run(100, validate=validate, validate_every=10, patience=2)
    assert (int(state.step), int(state.best.step)) == (30, 10)


def test_validation_that_is_not_finite_stops():
    validate, _ = validation([1.0, float("nan")])
    with pytest.raises(NonFiniteError, match="validation_w1 is nan of the parameters after step 10 "):
        regression.run(100, validate=validate, validate_every=5)
    with pytest.raises(ValueError, match="at least one score"):
        regression.run(5, validate=lambda params: {}, validate_every=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"scan_steps": 0}, "scan_steps must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"checkpoint_every": 12}, "must be a multiple of scan_steps=5.*got 12. Take 10, or scan_steps=1"),
        ({"validate": lambda p: {"a": 0.0}, "validate_every": 7}, "validate_every must be a multiple of scan_steps=5"),
        ({"patience": 3}, "patience=3 needs validate"),
        ({"patience": 0, "validate": lambda p: {"a": 0.0}}, "patience must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"ema_every": 0}, "ema_every must be at least 1"),
        ({"ema_decay": None, "ema_every": 10}, "without ema_decay there is none"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        regression.run(**{"n_steps": 20, **options})


def test_states_and_batches_that_do_not_fit(uninterrupted):
    with pytest.raises(ValueError, match="n_steps must be at least the 20 steps.*got 5"):
        regression.run(5, state=uninterrupted[0])
    with pytest.raises(
        ValueError, match=r"state is not one of this run: \.ema\['v'\] is float32\[4, 3\]; .* ask for none"
    ):
        regression.run(40, state=uninterrupted[0], ema_decay=None)
    wider = uninterrupted[0]._replace(params={**uninterrupted[0].params, "w": jnp.ones((3, 5))})
    with pytest.raises(ValueError, match=r"\.params\['w'\] is float32\[3, 5\]; .* ask for float32\[3, 4\]"):
        regression.run(40, state=wider)

    def ragged(at):
        return lambda n: jax.tree.map(lambda x: x[: 7 if n == at else 8], regression.batch_at(n))

    for at in (3, 5):  # within a group, and between groups
        with pytest.raises(ValueError, match=r"all batches must have one shape.*\['x'\].*float32.*7, 3"):
            regression.run(20, batches=ragged(at) if at == 3 else lambda n: ragged(n if n >= 5 else -1)(n))
    with pytest.raises(ValueError, match="all batches must have one structure"):
        regression.run(20, batches=lambda n: regression.batch_at(n) | ({"z": np.ones(1)} if n == 2 else {}))


@pytest.mark.parametrize("mesh", [False, True])
def test_batches_of_numpys_wide_numbers(mesh):
    """int64 and float64 are narrow on devices, in the first call as in the next."""

    def batches(n):
        return {"x": np.random.default_rng(n).normal(size=(4, 2)), "label": np.arange(4)}

    def loss(params, batch, key):
        total = jnp.mean((batch["x"] @ params["w"] - batch["label"]) ** 2)
        return total, {"total": total}

    options = {"key": jax.random.key(0), "n_steps": 6, "scan_steps": 2, "mesh": make_mesh(1) if mesh else None}
    assert fit(loss, {"w": jnp.zeros(2)}, optax.sgd(0.1), batches, **options).step == 6
