"""What TensorBoard would read: the event files, taken apart by hand."""

import builtins
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import regression

from scjax.train.hooks import JsonlLogger, TensorBoard

pytest.importorskip("tensorboardX", reason="the extra `logging` is not installed")


def events(folder: Path) -> Iterator:
    """A file is a row of records: length in 8 bytes, 4 of checksum, so many bytes of an Event, 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By name and step; as TensorBoard does, a start at step n forgets what came before from n on."""
    found: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.HasField("session_log"):
            found = {name: {s: v for s, v in of.items() if s < event.step} for name, of in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def logged(path: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for name in row.keys() - {"step", "seconds", "waited"}:
            found.setdefault(name, {})[row["step"]] = row[name]
    return found


def same(folder: Path, log: Path) -> None:
    """The two logs of one run agree, to the float32 that a scalar is."""
    told, wanted = scalars(folder), logged(log)
    group = {name: "validation/score" if name == "validation_score" else f"train/{name}" for name in wanted}
    assert set(told) == set(group.values())
    for name, values in wanted.items():
        assert told[group[name]] == pytest.approx(values, rel=1e-6)


def test_all_that_the_log_has(tmp_path):
    hooks = [JsonlLogger(tmp_path / "log.jsonl"), TensorBoard(tmp_path / "board")]
    validation = {"validate": lambda params: {"score": abs(params["w"]).sum()}, "validate_every": 5}
    regression.run(20, hooks=hooks, log_every=5, **validation)
    same(tmp_path / "board", tmp_path / "log.jsonl")
    assert set(scalars(tmp_path / "board")["validation/score"]) == {5, 10, 15, 20}
    assert {"train/loss", "train/mse", "train/decay", "train/grad_norm"} <= set(scalars(tmp_path / "board"))


@pytest.mark.parametrize("first", [10, 0])
def test_a_resumed_run_counts_no_step_twice(tmp_path, first):
    """Taken up at an earlier step than the last that was logged; or at none, where it was killed that early."""
    board = TensorBoard(tmp_path)
    board.on_start(0, 30)
    for step in (5, 10, 15):
        board.on_log(step, {"loss": 1.0})
    board.on_end()
    again = TensorBoard(tmp_path, resumed=True)
    again.on_start(first, 30)
    again.on_log(20, {"loss": 2.0})
    again.on_end()
    kept = {5: 1.0, 10: 1.0} if first else {}
    assert scalars(tmp_path) == {"train/loss": {**kept, 20: 2.0}}


def test_the_log_of_another_run_is_not_touched(tmp_path):
    (tmp_path / "events.out").write_text("another")
    board = TensorBoard(tmp_path)
    with pytest.raises(ValueError, match="holds the log of another run; choose another folder, or resume that run"):
        board.on_start(0, 10)
    board.on_end()
    assert [p.name for p in tmp_path.iterdir()] == ["events.out"]


def test_without_the_library(tmp_path, monkeypatch):
    """It is missed at once, and not when the first step has been made."""
    real = builtins.__import__

    def missing(name, *rest):
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ImportError, match="needs tensorboardX: pip install tensorboardX, or scjax with the extra logging"
    ):
        TensorBoard(tmp_path)
