"""Two writers of one folder: the second is refused, and the first notices nothing."""

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import victim
from victim import bits, ended, log, process

from scjax import bench
from scjax.checkpoint import CheckpointWriter, list_steps, read, sole_writer


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_second_run_is_refused_without_harm_to_the_first(uninterrupted, tmp_path):
    """In either way to start it; and the first one's death, however it comes, lets the next one in."""
    folder = tmp_path / "run"
    first = process(folder, "--stall-at", 9)
    try:
        first.stdout.readline()
        while not list_steps(folder / "checkpoints"):
            assert first.poll() is None
        who = f"is being written into by process {first.pid} on {socket.gethostname()}. Wait for its end, or choose"
        with pytest.raises(ValueError, match=who):
            victim.run(folder, resume=True)
        with pytest.raises(ValueError, match=who):
            CheckpointWriter(folder / "checkpoints", about={"run": "another"})
        with pytest.raises(ValueError, match="holds another run; nothing is overwritten"):
            victim.run(folder)
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        assert ended(first)[0] == -signal.SIGKILL
    finally:
        first.kill()
    assert (folder / "checkpoints" / ".lock").exists()  # what the kill left locks nobody out
    victim.run(folder, resume=True)
    assert not (folder / "checkpoints" / ".lock").exists()
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)


def test_refused_run_changes_no_file(uninterrupted, tmp_path):
    with CheckpointWriter(tmp_path, about={"run": "a"}) as writer:
        writer.save(1, {"x": np.ones(3)})
        writer.wait()
        before = files_of(tmp_path)
        for resume_from in (None, 1):
            with pytest.raises(ValueError, match=f"by process {os.getpid()} on"):
                CheckpointWriter(tmp_path, about={"run": "a"}, resume_from=resume_from)
        assert files_of(tmp_path) == before
        writer.save(2, {"x": np.ones(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    with CheckpointWriter(tmp_path, about={"run": "a"}, resume_from=2):
        pass


def test_two_runs_that_begin_at_once(tmp_path):
    """Both were let into the empty folder; the settings of the one that was faster stay."""
    folder, theirs = tmp_path / "run", {}

    def batches(n):
        raise AssertionError("the second run must not come so far")

    def prepare(experiment, adata, store):
        victim.run(folder)
        theirs.update(files_of(folder))
        return victim.prepare(batches)(experiment, adata)

    with pytest.raises(ValueError, match="another run began in .*run meanwhile; choose a new folder"):
        victim.train_task(
            victim.EXPERIMENT,
            SimpleNamespace(n_obs=0),
            folder,
            victim.DIGEST,
            prepare,
            resume=False,
            step=None,
            hooks=(),
        )
    assert files_of(folder) == theirs


def test_lock_of_one_who_goes_just_now(tmp_path, monkeypatch):
    """The file is opened, and deleted by its owner before it is locked: a lock on it would keep nobody out."""
    flock, calls = fcntl.flock, []

    def late(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_writer(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is being written into"), sole_writer(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_disk_that_became_read_only_hides_no_error(tmp_path, monkeypatch):
    """The lock file cannot be removed then; what went wrong is what is told, and the lock is free."""

    def unlink(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(ValueError, match="a checkpoint could not be written"), sole_writer(tmp_path):
            raise ValueError("a checkpoint could not be written")
    with sole_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="without locks .*No locks available"), sole_writer(tmp_path):
        assert not list(tmp_path.iterdir())


def test_second_benchmark_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "make_grid", lambda *args, **options: ((), ()))
    with sole_writer(tmp_path), pytest.raises(ValueError, match="is being written into by process"):
        bench.bench(tmp_path)
    bench.bench(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells", "report.md", "results.json"]


def test_nothing_is_read_from_the_lock(tmp_path):
    """Whatever stands in a file that a killed process left."""
    (tmp_path / ".lock").write_bytes(os.urandom(300))
    with CheckpointWriter(tmp_path, about={"run": "a"}) as writer:
        writer.save(1, {"x": np.ones(3)})
    assert read(tmp_path).step == 1
