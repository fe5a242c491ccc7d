"""Disks that are full, read-only or gone: an error that says so, and what was good stays good."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import victim
from victim import bits, ended, log, process

from scjax.checkpoint import CheckpointWriter, list_steps, read


def test_full_disk_while_a_checkpoint_is_written(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    status, told = ended(process(folder, "--file-size", 10_000, "--full-at", 8))
    (*_, newest) = list_steps(folder / "checkpoints")
    assert status == 1
    assert f"OSError: a checkpoint could not be written into {folder / 'checkpoints'}: File too large." in told
    assert f"The newest complete one is step {newest}." in told
    assert int(read(folder / "checkpoints").arrays["state"]["step"]) == newest
    victim.run(folder, resume=True)
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["22", "23", "24"]


def test_full_disk_while_the_log_is_written(tmp_path):
    """A line that was written in part is not one. Without a checkpoint, the error says that there is none."""
    folder, other = tmp_path / "run", tmp_path / "other"
    status, told = ended(process(folder, "--every", 24, "--file-size", 900, "--full-at", 3))
    assert status == 1
    assert f"OSError: [Errno 27] File too large: '{folder / 'metrics.jsonl'}'" in told
    assert f"The run in {folder} has no checkpoint yet." in told
    assert (folder / "metrics.jsonl").stat().st_size == 900
    victim.run(folder, resume=True, checkpoint_every=24)
    victim.run(other, checkpoint_every=24)
    assert bits(folder) == bits(other)
    assert log(folder) == log(other)


def test_full_disk_at_the_start(uninterrupted, tmp_path):
    """Half a file of settings is no run: the folder is as good as new."""
    folder = tmp_path / "run"
    status, told = ended(process(folder, "--file-size", 500))
    assert status == 1
    assert "File too large" in told
    assert not (folder / "experiment.json").exists()
    victim.run(folder)
    assert bits(folder) == bits(uninterrupted)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "experiment.json", "metrics.jsonl", "split.json"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 300 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    # To fill a real disk it must be small: the other tests here limit the size of files, as any user may.
    if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root of Linux may mount the small disk that this test fills")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_disk_that_is_really_full_and_then_read_only(uninterrupted, disk):
    folder = disk / "run"
    status, told = ended(process(folder))
    assert status == 1
    assert "No space left on device" in told
    steps = list_steps(folder / "checkpoints")
    for step in steps:
        assert int(read(folder / "checkpoints", step).arrays["state"]["step"]) == step
    if steps:
        assert f"step {steps[-1]}" in told
    remount(disk, "ro")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="Read-only file system"):
        victim.run(folder, resume=True)
    with pytest.raises(OSError, match="Read-only file system"):
        victim.run(disk / "another")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    remount(disk, "rw,size=64m")
    victim.run(folder, resume=bool((folder / "experiment.json").exists()))
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)


def test_folder_where_nobody_may_write(tmp_path):
    """A file stands where the folder of the run, or one above it, should be. This stops root, too."""
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(OSError, match="file"):
            victim.run(folder)
        with pytest.raises(OSError, match="file"):
            CheckpointWriter(folder, about={"run": "a"})
    with pytest.raises(ValueError, match="workdir must be a folder; .*file is a file"):
        victim.run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's writers, told late
def test_folder_that_vanishes_during_the_run(tmp_path):
    """Somebody deletes the run: the next checkpoint is an error, no silent start of another folder."""
    folder = tmp_path / "run"

    def batches(n):
        if n == 12:
            (folder / "checkpoints").rename(tmp_path / "moved")
        return victim.batch_at(n)

    with pytest.raises(OSError, match=r"a checkpoint could not be written into .*checkpoints"):
        victim.run(folder, batches=batches)
    assert list_steps(folder / "checkpoints") == ()
    steps = list_steps(tmp_path / "moved")
    assert all(int(read(tmp_path / "moved", step).arrays["state"]["step"]) == step for step in steps)


def test_checkpoint_that_somebody_deletes_under_way(tmp_path):
    with CheckpointWriter(tmp_path, about={"run": "a"}, keep=2) as writer:
        for step in (1, 2, 3):
            writer.save(step, {"x": np.ones(3)})
            writer.wait()
            shutil.rmtree(tmp_path / str(step))
    assert list_steps(tmp_path) == ()
