import io
import json
import re

import numpy as np
import pytest
import regression

from scjax.checkpoint import CheckpointWriter, read
from scjax.train.hooks import JsonlLogger, Progress, SaveCheckpoints


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tell(hook, steps, n_steps=100):
    hook.on_start(0, n_steps)
    hook.on_compiled(1.25)
    for step in steps:
        hook.on_log(step, {"loss": 1.5, "mse": 0.25})
    hook.on_end()


def test_progress_on_a_terminal():
    out = Terminal()
    tell(Progress(cells_per_step=512, file=out), range(10, 101, 10))
    text = out.getvalue()
    assert "compiled in 1.2 s" in text
    last = re.split(r"[\r\n]+", text.strip())[-2]  # before what it waited
    assert re.search(r"training: 100%.*100/100.* steps/s, cells/s=[\d,]+, loss=1.5, mse=0.25", last)


def test_progress_elsewhere_is_silent_or_sparse():
    out = io.StringIO()
    tell(Progress(file=out), range(1, 101))
    assert out.getvalue() == ""
    tell(Progress(file=out, force=True), range(1, 101))
    lines = out.getvalue().splitlines()
    assert lines[0] == "compiled in 1.2 s"
    assert len(lines) == 1 + 11 + 1  # the first step, and every tenth of the run
    assert re.fullmatch(r"step 100/100, .* steps/s, 0 s left: loss 1.5, mse 0.25", lines[-2])
    assert re.fullmatch(r"waited 0 s of \S+ s for batches \(0.0%\)", lines[-1])


def test_log_has_one_line_a_step_after_resuming(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    first = JsonlLogger(path)
    tell(first, [10, 20, 30])
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed here
    again = JsonlLogger(path)
    again.on_start(20, 100)
    again.on_log(30, {"loss": 9.0})
    again.on_end()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 1.5), (20, 1.5), (30, 9.0)]
    assert set(lines[0]) == {"step", "seconds", "waited", "loss", "mse"}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_log_of_another_run_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    logger = JsonlLogger(path)
    with pytest.raises(ValueError, match="holds the log of another run; choose another path, or resume"):
        logger.on_start(0, 10)
    logger.on_end()  # the loop ends every hook that it began to start
    assert path.read_text() == '{"step": 1}\n'


def test_checkpoints_carry_extra_arrays(tmp_path):
    mean = np.arange(3.0)
    with CheckpointWriter(tmp_path, about={"run": "a"}) as writer:
        hook = SaveCheckpoints(writer, extra={"transform": {"mean": mean}})
        assert hook.saved is None
        state = regression.run(10, hooks=[hook], checkpoint_every=5)
        assert hook.saved == (tmp_path, 10)
        # The run has ended, so the writing has too.
        _, arrays, _ = read(tmp_path)
    np.testing.assert_array_equal(arrays["transform"]["mean"], mean)
    assert arrays["transform"]["mean"].dtype == np.float64
    assert regression.bits(arrays["state"]["params"]) == regression.bits(state.params)
    with pytest.raises(ValueError, match="extra must not hold 'state'"):
        SaveCheckpoints(writer, extra={"state": mean})
