"""What happens beside the steps: a progress bar, a log file, checkpoints. `fit` calls the hooks in the order given."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from scjax.checkpoint import CheckpointWriter

from .errors import NonFiniteError, Saved
from .state import TrainState

__all__ = ["Hook", "JsonlLogger", "Progress", "SaveCheckpoints", "Saved", "TensorBoard", "read_log"]

VALIDATION = "validation_"  # before the names of scores, which `on_log` is told beside the metrics of steps
_BAR = "{desc}{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Hook:
    """Does nothing; a hook of your own overrides what it needs. A step's number counts finished steps, from 1.

    Attributes:
        every_process: of a run on several processes the first alone tells its hooks anything, unless this is True; the
            hooks for which it is come before the others.
    """

    every_process = False

    def on_start(self, step: int, n_steps: int) -> None:
        """Before anything is compiled; `step` steps are done already. To refuse the run, raise ValueError here."""

    def on_compiled(self, seconds: float) -> None:
        """The update is compiled, and the first step is about to run."""

    def on_wait(self, step: int, seconds: float) -> None:
        """After `step` steps the loop waited so long for its next batches: what the data hold up."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of `step` itself (no average), every `log_every` steps; or its validation scores."""

    def on_checkpoint(self, state: TrainState) -> None:
        """Every `checkpoint_every` steps, at the end, at SIGTERM. The next step takes the arrays: copy to keep."""

    def on_finish(self) -> None:
        """After the last step and what belongs to it, also at SIGTERM, not after an error of this run: complete what is
        under way. The run counts as saved when this has returned; what it raises ends the run, on all its processes.
        """

    def on_end(self) -> None:
        """Whatever ended the run, also an error. Called once for every hook that was started."""

    @property
    def saved(self) -> Saved | None:
        """The newest checkpoint of this run that the hook knows of, if it writes any."""
        return None


class Progress(Hook):
    """Steps per second, loss terms and time left, on one line of the terminal; the compile time apart. At the end, how
    long the loop waited for batches (`waited`, in seconds; the first ones, before anything was compiled, are left out).

    Args:
        cells_per_step: shows cells per second too.
        file: an open text file, stderr if None. Unless it is a terminal nothing is shown;
        force: with this, a plain line at every tenth of the run.
    """

    def __init__(self, cells_per_step: int | None = None, *, file: Any = None, force: bool = False):
        self.cells_per_step = cells_per_step
        self.file = sys.stderr if file is None else file
        self.terminal = self.file.isatty()
        self.shown = self.terminal or force
        self._bar = None

    def on_start(self, step: int, n_steps: int) -> None:
        self._first, self._n_steps, self._tenth, self._words = step, n_steps, -1, {}
        self._started, self.waited = None, 0.0
        if self.terminal:
            from tqdm import tqdm

            # Terminals without a width (docker -t) report 0 columns, into which tqdm would fit an empty bar.
            width: dict[str, Any] = {"dynamic_ncols": True} if _columns(self.file) else {"ncols": 120, "nrows": 24}
            self._bar = tqdm(
                total=n_steps, initial=step, desc="compiling", unit=" steps", bar_format=_BAR, file=self.file, **width
            )

    def on_compiled(self, seconds: float) -> None:
        self._started = time.perf_counter()
        if self._bar is not None:
            self._bar.set_description("training", refresh=False)
            self._bar.unpause()  # the clock of the rates starts now
        self._write(f"compiled in {seconds:.1f} s")

    def on_wait(self, step: int, seconds: float) -> None:
        if self._started is not None:
            self.waited += seconds

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.shown or self._started is None:
            return
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = (step - self._first) / seconds
        if self.cells_per_step is not None:
            self._words["cells/s"] = f"{rate * self.cells_per_step:,.0f}"
        self._words |= {
            name: f"{value:.4g}" for name, value in metrics.items()
        }  # validation scores stay until the next
        if self._bar is not None:
            self._bar.set_postfix(self._words, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        tenth = 10 * step // self._n_steps
        if tenth > self._tenth:
            self._tenth = tenth
            left = (self._n_steps - step) / max(rate, 1e-9)
            terms = ", ".join(f"{name} {word}" for name, word in self._words.items())
            self._write(f"step {step}/{self._n_steps}, {rate:.3g} steps/s, {left:.0f} s left: {terms}")

    def on_end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._started is not None:
            seconds = max(time.perf_counter() - self._started, 1e-9)
            self._write(f"waited {self.waited:.2g} s of {seconds:.3g} s for batches ({self.waited / seconds:.1%})")
            self._started = None

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self.file)
        elif self.shown:
            self.file.write(line + "\n")
            self.file.flush()


def _columns(file: Any) -> int:
    try:
        return os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):  # no descriptor behind it
        return 0


class JsonlLogger(Hook):
    """One JSON object a line: step, seconds since this process began to step, of which it waited for batches, and
    every metric.

    A resumed run continues the file: lines after its first step, and a line cut short by a kill, are dropped, so that
    no step appears twice.

    Args:
        resumed: the file is of this run, even if it begins with its first step.

    Raises:
        ValueError: at the start of a fresh run, where the file holds lines of another.
        OSError: a line could not be written; the file is named.
    """

    def __init__(self, path: str | Path, *, resumed: bool = False):
        self.path = Path(path)
        self.resumed = resumed
        self._file: Any = None

    def on_start(self, step: int, n_steps: int) -> None:
        if self.path.exists():
            if step == 0 and not self.resumed and self.path.stat().st_size:
                raise ValueError(f"{self.path} holds the log of another run; choose another path, or resume that run.")
            self._keep_up_to(step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)  # what cannot be written must not come again when it is closed
        self._started, self._waited = time.perf_counter(), 0.0

    def on_compiled(self, seconds: float) -> None:
        self._started, self._waited = time.perf_counter(), 0.0

    def on_wait(self, step: int, seconds: float) -> None:
        self._waited += seconds

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        times = {"step": step, "seconds": seconds, "waited": round(self._waited, 3)}
        line = (json.dumps(times | dict(metrics)) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as err:
            raise OSError(err.errno, err.strerror, str(self.path)) from err

    def on_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep_up_to(self, step: int) -> None:
        kept = [line for line, row in _rows(self.path) if row["step"] <= step]
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, self.path)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines that a `JsonlLogger` wrote, in order; none where there is no file. A line cut short is left out."""
    return [row for _, row in _rows(Path(path))] if Path(path).exists() else []


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            continue  # half a line, from a process that was killed
        if line.endswith("\n") and isinstance(step, int):
            yield line, row


class TensorBoard(Hook):
    """Every metric as a scalar for TensorBoard: `train/loss` and the other terms, `validation/...` the scores.

    A resumed run writes a further file into the folder; TensorBoard leaves out what the files before it say of the
    steps that are done again.

    Args:
        resumed: the files in the folder are of this run, even if it begins with its first step.

    Raises:
        ImportError: tensorboardX is missing.
        ValueError: at the start of a fresh run, a folder that holds something already.
    """

    def __init__(self, folder: str | Path, *, resumed: bool = False):
        try:
            import tensorboardX  # noqa: F401
        except ImportError as err:
            raise ImportError(
                "logging for TensorBoard needs tensorboardX: pip install tensorboardX, or scjax with the extra logging."
            ) from err
        self.folder = Path(folder)
        self.resumed = resumed
        self._writer: Any = None

    def on_start(self, step: int, n_steps: int) -> None:
        from tensorboardX import SummaryWriter

        before = list(self.folder.iterdir()) if self.folder.exists() else []
        if before and step == 0 and not self.resumed:
            raise ValueError(f"{self.folder} holds the log of another run; choose another folder, or resume that run.")
        again: dict[str, Any] = {"purge_step": step + 1} if step or self.resumed else {}
        # Names are made of the second, and a file of the same name would be overwritten.
        self._writer = SummaryWriter(str(self.folder), filename_suffix=f".{len(before)}", **again)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            group = "validation" if name.startswith(VALIDATION) else "train"
            self._writer.add_scalar(f"{group}/{name.removeprefix(VALIDATION)}", value, step)
        self._writer.flush()

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class SaveCheckpoints(Hook):
    """Hands the state to a `CheckpointWriter` under "state", with `extra` arrays beside it (a fitted transform, say).

    The hook waits for the last write at the end of the run; opening and closing the writer is the caller's.

    Raises:
        NonFiniteError: parameters that are not finite are not saved. The loop looks at loss and gradient, and would
            meet them in the next step.
    """

    every_process = True  # arrays that are spread over the processes are brought together by all of them

    def __init__(self, writer: CheckpointWriter, extra: Mapping[str, Any] | None = None):
        extra = dict(extra or {})
        if "state" in extra:
            raise ValueError("extra must not hold 'state', the name of the training state; rename it.")
        self.writer = writer
        self.extra = extra

    def on_checkpoint(self, state: TrainState) -> None:
        if not _all_finite((state.params, state.ema)):
            step = int(state.step)
            problem = f"the parameters after step {step} are not finite, as its update was too large"
            raise NonFiniteError(problem, step=step, term="parameters", metrics={}, state=state, saved=self.saved)
        self.writer.save(int(state.step), {"state": state, **self.extra})

    def on_finish(self) -> None:
        self.writer.wait()

    def on_end(self) -> None:
        self.writer.wait()  # after an error; else nothing is left to wait for

    @property
    def saved(self) -> Saved | None:
        step = self.writer.last_step
        return None if step is None else Saved(self.writer.directory, step)


@jax.jit
def _all_finite(tree: Any) -> Any:
    """In one program; of arrays spread over processes on each of them."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
