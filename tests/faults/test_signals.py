"""SIGTERM and Ctrl-C, whatever the run is waiting for."""

import signal
import subprocess

import pytest
import victim
from victim import bits, log, process

from scjax import bench
from scjax.checkpoint import CheckpointWriter, list_steps
from scjax.cli import main
from scjax.train.hooks import Hook, Saved
from scjax.train.loop import Interrupted


def signalling(number: int):
    """Batches whose thirteenth comes with a signal."""

    def batches(n):
        if n == 12:
            signal.raise_signal(number)
        return victim.batch_at(n)

    return batches


def test_second_sigterm_acts_at_once(uninterrupted, tmp_path):
    """The first one waits for the batch in hand, which takes ten minutes here. What was saved is sound.

    The batch is the first of a resumed run: with steps before it, the first signal could end one of those.
    """
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        victim.run(folder, batches=signalling(signal.SIGTERM))
    (*_, newest) = list_steps(folder / "checkpoints")
    running = process(folder, "--resume", "--stall-at", newest)
    try:
        assert running.stdout.readline() == "stalled\n"
        for _ in range(100):
            running.send_signal(signal.SIGTERM)
            try:
                running.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                continue
        assert running.returncode == -signal.SIGTERM
    finally:
        running.kill()
    assert list_steps(folder / "checkpoints")[-1] == newest
    victim.run(folder, resume=True)
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)


class Ends(Hook):
    def __init__(self):
        self.n = 0

    def on_end(self):
        self.n += 1


@pytest.fixture
def heard():
    """SIGINT is as at a keyboard, though the jobs that a shell puts into the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "SIGINT"]
)
def test_signal_while_the_loop_waits_for_a_batch(uninterrupted, tmp_path, heard, number, error):
    """It comes from the thread that makes the batches. The folder is left so that the run can go on from it."""
    folder, ends = tmp_path / "run", Ends()
    with pytest.raises(error):
        victim.run(folder, batches=signalling(number), hooks=[ends])
    assert ends.n == 1
    (*_, newest) = list_steps(folder / "checkpoints")
    assert newest < 24
    with CheckpointWriter(tmp_path / "other", about={"run": "a"}):  # no lock, no thread of the run is left
        victim.run(folder, resume=True)
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)


def interrupted(monkeypatch, capsys, saved, *arguments) -> tuple[int, str]:
    """Status and stderr of a command whose work ends by SIGTERM."""

    def stopped(*args, **options):
        raise Interrupted(7, saved)

    for place in ("scjax.experiment.train", "scjax.bench.bench", "scjax.demo.demo"):
        monkeypatch.setattr(place, stopped)
    monkeypatch.setattr("scjax.cli._read_data", lambda *args, **options: None)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code, capsys.readouterr().err


def test_commands_that_can_go_on_say_how(monkeypatch, capsys, tmp_path):
    saved = Saved(tmp_path, 7)
    train = ("train", "--preset", "scimf/klein", "--out", "a folder", "--data", "x.h5ad", "--n-steps", "100")
    status, told = interrupted(monkeypatch, capsys, saved, *train)
    assert status == 0
    assert f"scjax: Stopped by SIGTERM after step 7; step 7 is saved in {tmp_path}" in told
    assert told.endswith("To go on:\n  scjax train --resume --out 'a folder' --data x.h5ad\n")
    status, told = interrupted(monkeypatch, capsys, None, *train)
    assert (status, "there is no checkpoint of this run" in told) == (0, True)
    status, told = interrupted(monkeypatch, capsys, saved, "bench", "--out", "b", "--seeds", "2")
    assert (status, told.endswith("To go on:\n  scjax bench --out b --seeds 2\n")) == (0, True)
    status, told = interrupted(monkeypatch, capsys, saved, "demo")
    assert (status, "To go on" in told) == (1, False)
    assert callable(bench.bench)
