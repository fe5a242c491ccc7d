"""An error of the thread that makes batches reaches the user with its place; nothing hangs, no thread is left."""

import signal
import threading
import time

import pytest
import victim

from scjax.checkpoint import list_steps
from scjax.data.device import prefetch
from scjax.train.hooks import Hook


@pytest.fixture(autouse=True)
def no_hang():
    """Ends a test that waits for ever, and finds threads that were left behind."""

    def give_up(number, frame):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not [t for t in threading.enumerate() if t.name.startswith("scjax-prefetch")]


class Ends(Hook):
    def __init__(self):
        self.n = 0

    def on_end(self):
        self.n += 1


def failing(error, at=9, after=0.0):
    def batches(n):
        if n == at:
            time.sleep(after)
            raise error
        return victim.batch_at(n)

    return batches


class OddError(Exception):
    """One that nobody has heard of, and that cannot be made without arguments."""

    def __init__(self, one, two):
        super().__init__(one)


@pytest.mark.parametrize("error", [KeyError("lost"), OSError(5, "Input/output error"), OddError(1, 2), MemoryError()])
@pytest.mark.parametrize("after", [0.0, 0.3], ids=["ahead of the loop", "while the loop waits"])
def test_error_of_a_batch(tmp_path, error, after):
    ends = Ends()
    with pytest.raises(type(error)) as caught:
        victim.run(tmp_path / "run", batches=failing(error, after=after), hooks=[ends])
    assert caught.value is error
    assert "While making the batch of step 9." in error.__notes__
    (*_, newest) = list_steps(tmp_path / "run" / "checkpoints")
    assert f"The newest checkpoint of the run in {tmp_path / 'run'} is step {newest}: continue" in error.__notes__[-1]
    assert ends.n == 1


def test_end_of_iteration_is_no_end_of_the_run(tmp_path):
    """`next` of an empty iterator, in a user's batches: a generator must not take it for its own end."""
    with pytest.raises(RuntimeError, match="StopIteration"):
        victim.run(tmp_path / "run", batches=failing(StopIteration()))


def test_exit_in_a_batch(tmp_path):
    with pytest.raises(SystemExit, match="enough"):
        victim.run(tmp_path / "run", batches=failing(SystemExit("enough")))


class Fails(Hook):
    def on_log(self, step, metrics):
        if step == 7:
            raise KeyError("mine")


def test_consumer_that_fails_stops_the_worker(tmp_path):
    with pytest.raises(KeyError, match="mine") as caught:
        victim.run(tmp_path / "run", hooks=[Fails()])
    assert "The newest checkpoint of the run" in caught.value.__notes__[-1]


def test_abandoned_generator_stops_its_thread():
    """A loop that is left by an error keeps the generator in its traceback; it ends when that is dropped."""
    chunks = prefetch(victim.batch_at, 0, 1_000_000, chunk=2, depth=3)
    next(chunks)
    del chunks


def test_error_is_the_same_however_often_it_is_asked_for():
    chunks = prefetch(failing(KeyError("lost"), at=2), 0, 10)
    next(chunks), next(chunks)
    with pytest.raises(KeyError, match="lost"):
        next(chunks)
    assert next(chunks, "over") == "over"
