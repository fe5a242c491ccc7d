"""kill -9, whenever it comes: what is on the disk is whole, and the run goes on as if nothing had been."""

import random
import signal
import time
from pathlib import Path

import pytest
import victim
from victim import bits, ended, log, process

from scjax.checkpoint import list_steps, read
from scjax.cli import main
from scjax.experiment import read_experiment

FILES = ["checkpoints", "experiment.json", "metrics.jsonl", "split.json"]  # of a run, and nothing besides


def killed(folder: Path, chance: random.Random) -> bool:
    """One life of the run, ended at a random moment; whether it was, as it may have been done before.

    Half of them die in the middle of the files, just before one more is opened, renamed or deleted, from the first
    settings to the old checkpoints; the others at any time after the first step was compiled.
    """
    resume = ["--resume"] if (folder / "experiment.json").exists() else []
    if chance.random() < 0.5:
        latest = 40 if chance.random() < 0.3 else 300
        status, told = ended(process(folder, *resume, "--die-at", chance.randint(1, latest)))
    else:
        running = process(folder, *resume)
        running.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.5))
        running.send_signal(signal.SIGKILL)
        status, told = ended(running)
    assert status in (0, -signal.SIGKILL), told
    return status != 0


def assert_sound(folder: Path, capsys) -> None:
    """What counts as a checkpoint can be read, and `scjax show` is not confused by what lies beside."""
    steps = list_steps(folder / "checkpoints")
    for step in steps:
        assert int(read(folder / "checkpoints", step).arrays["state"]["step"]) == step
    if (folder / "experiment.json").exists():
        assert read_experiment(folder) == victim.EXPERIMENT
    if steps:
        main(["show", str(folder)])
        shown = capsys.readouterr().out
        assert f"checkpoints: steps {', '.join(map(str, steps))}\n" in shown
        assert "DAMAGED" not in shown


def survives(folder: Path, n_kills: int, chance: random.Random, uninterrupted: Path, capsys) -> int:
    """Kills the run up to `n_kills` times and lets it end; how often it was killed."""
    kills = 0
    while kills < n_kills and killed(folder, chance):
        kills += 1
        assert_sound(folder, capsys)
    resume = ["--resume"] if (folder / "experiment.json").exists() else []
    status, told = ended(process(folder, *resume))
    assert status == 0, told
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["22", "23", "24"]
    return kills


def test_five_kills(uninterrupted, tmp_path, capsys):
    chance, kills = random.Random(3), 0
    while kills < 5:
        kills += survives(tmp_path / f"run{kills}", 5 - kills, chance, uninterrupted, capsys)


@pytest.mark.slow
def test_fifty_kills(uninterrupted, tmp_path, capsys):
    chance, kills = random.Random(1), 0
    while kills < 50:
        kills += survives(tmp_path / f"run{kills}", min(7, 50 - kills), chance, uninterrupted, capsys)


def test_a_run_that_lost_its_checkpoints_does_not_begin_again(uninterrupted, tmp_path, capsys):
    """A kill before the first checkpoint costs nothing; lost checkpoints are not mistaken for that."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("experiment.json", "split.json", "metrics.jsonl"):
        (folder / name).write_bytes((uninterrupted / name).read_bytes())
    with pytest.raises(ValueError, match="has no checkpoint, and its log goes up to step 24: the checkpoints are gone"):
        victim.run(folder, resume=True)
    assert log(folder) == log(uninterrupted)
    first, second, _ = (folder / "metrics.jsonl").read_text().split("\n", 2)
    (folder / "metrics.jsonl").write_text(f"{first}\n{second[:10]}")
    victim.run(folder, resume=True)
    assert "has no checkpoint yet; the run begins again at its first step" in capsys.readouterr().err
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)
