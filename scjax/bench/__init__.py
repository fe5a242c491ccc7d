"""The benchmark of the library: systems and baselines on real data, one result a file, and the report of all.

outcome = bench("runs/bench")                       again with the same folder: only what is missing
print(outcome.report)
"""

import gc
import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from scjax.bench.grid import SYSTEMS, Cell, make_grid
from scjax.bench.report import comparisons, render
from scjax.check import at_least
from scjax.checkpoint import list_steps, provenance, sole_writer
from scjax.config import to_dict
from scjax.experiment import digest_of, evaluate, read_experiment, report_of, train_seeds
from scjax.metrics.report import environment
from scjax.train.hooks import Hook

__all__ = ["Outcome", "bench", "listed"]

_DONE, _FAILED = "done", "failed"


class Outcome(NamedTuple):
    """What a call of `bench` found.

    Attributes:
        report: Markdown, also in report.md.
        failed: names of the cells of this call that could not be completed.
        n_done: cells of this call that are there now.
    """

    report: str
    failed: tuple[str, ...]
    n_done: int


def bench(
    out: str | Path,
    *,
    data: str | Path | None = None,
    n_seeds: int = 3,
    systems: Sequence[str] = SYSTEMS,
    only: Sequence[str] = (),
    n_steps: int | None = None,
    together: int | None = None,
    n_draws: int = 5,
    tell: Callable[[str], None] = lambda line: None,
    hooks: Callable[[Any], Sequence[Hook]] = lambda experiment: (),
) -> Outcome:
    """Trains and evaluates every cell of the grid that has no result yet, and writes `out`:

        cells/NAME.json   one a cell, written at once when it is done: settings, tables, comparisons, or its error
        results.json      all of them, whatever call made them          report.md   the tables of all of them
        runs/NAME/        the runs, as `train` writes them

    A cell that was interrupted goes on from its checkpoints; one that failed is tried again. Cells do not depend on
    each other: what goes wrong in one is in its file, and the others are run.

    Args:
        data: a folder of further data sets, see `make_grid`.
        n_seeds: seeds 0, 1, ... of each cell.
        systems, only, n_steps: see `make_grid`.
        together: seeds that share one compiled program at most; None takes all.
        n_draws: of cells, in the evaluation.
        tell: is given a line for each cell that begins and ends.
        hooks: of a cell's training, from its experiment.

    Raises:
        ValueError: what `make_grid` finds; `out` holds something else, or results of other settings or other data under
            the name of a cell, or another benchmark writes there now. Nothing has been trained then.
        train.loop.Interrupted: SIGTERM.
    """
    out = Path(out)
    at_least("n_seeds", n_seeds, 1)
    if together is not None:
        at_least("together", together, 1)
    cells, unknown = make_grid(None if data is None else Path(data), systems=systems, only=only, n_steps=n_steps)
    _admit(out)
    with sole_writer(out):
        return _bench(out, cells, unknown, n_seeds, together, n_draws, tell, hooks)


def _bench(
    out: Path,
    cells: Sequence[Cell],
    unknown: Sequence[str],
    n_seeds: int,
    together: int | None,
    n_draws: int,
    tell: Callable[[str], None],
    hooks: Callable[[Any], Sequence[Hook]],
) -> Outcome:
    settings = {cell.name: _settings(cell, n_seeds, n_draws) for cell in cells}
    results = {cell.name: _known(out, cell, settings[cell.name]) for cell in cells}
    for name in unknown:
        tell(f"{name}: no known data set, left out")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(cells, start=1):
        known = results[cell.name]
        if known is not None and known["status"] == _DONE:
            continue
        tell(f"{number}/{len(cells)} {cell.name}: training with {n_seeds} seeds")
        record = _run(out, cell, settings[cell.name], n_seeds, together, n_draws, hooks(cell.experiment))
        _write(out / "cells" / f"{cell.file_stem}.json", json.dumps(record, indent=1) + "\n")
        results[cell.name] = record
        tell(f"{number}/{len(cells)} {cell.name}: {_told(record)}")
        jax.clear_caches()  # every cell compiles programs of its own
        gc.collect()
    everything = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    _write(out / "results.json", json.dumps(everything, indent=1) + "\n")
    report = render(everything)
    _write(out / "report.md", report)
    failed = tuple(name for name, record in results.items() if record and record["status"] == _FAILED)
    return Outcome(report, failed, len(cells) - len(failed))


def listed(
    out: str | Path,
    *,
    data: str | Path | None = None,
    systems: Sequence[str] = SYSTEMS,
    only: Sequence[str] = (),
    n_steps: int | None = None,
) -> str:
    """The grid, a line a cell, and which of them have a result in `out`; nothing is run or written."""
    cells, unknown = make_grid(None if data is None else Path(data), systems=systems, only=only, n_steps=n_steps)
    lines = []
    for cell in cells:
        path = Path(out) / "cells" / f"{cell.file_stem}.json"
        status = json.loads(path.read_text())["status"] if path.exists() else "to do"
        lines.append(f"{cell.name}: {cell.experiment.n_steps} steps, {status}")
    told = {f"{cell.system}/{cell.variant}: {cell.about}": None for cell in cells}
    left_out = [f"{name}: no known data set, left out" for name in unknown]
    return "\n".join([*lines, f"{len(cells)} lines of the grid.", *told, *left_out])


# -- one cell


def _run(
    out: Path,
    cell: Cell,
    settings: Mapping[str, Any],
    n_seeds: int,
    together: int | None,
    n_draws: int,
    hooks: Sequence[Hook],
) -> dict[str, Any]:
    record = {
        **{name: getattr(cell, name) for name in ("name", "system", "variant", "data", "split", "about", "n_times")},
        "settings": settings,
        "together": n_seeds if together is None else together,
        "environment": environment(),
        "source": provenance()["source"],
    }
    seeds, folders, began = range(n_seeds), _folders(out, cell, n_seeds), time.perf_counter()
    try:
        failed, resumed = {}, False
        size = n_seeds if together is None else together
        for i in range(0, n_seeds, size):
            some = slice(i, i + size)
            resume = all(list_steps(folder / "checkpoints") for folder in folders[some])
            for folder in folders[some]:
                if folder.exists() and not resume:  # interrupted before all of them had a checkpoint
                    _put_aside(folder)
            done = train_seeds(cell.experiment, cell.adata, folders[some], seeds[some], resume=resume, hooks=hooks)
            failed |= done.failed
            resumed |= resume
        trained = time.perf_counter()
        whole = [folder for seed, folder in zip(seeds, folders, strict=True) if seed not in failed]
        if not whole:
            raise next(iter(failed.values()))
        row = f"{cell.system} {cell.variant}"
        tables = evaluate({row: whole}, cell.adata, n_draws=n_draws)
        return record | {
            "status": _DONE,
            "resumed": resumed,
            "train_s": round(trained - began, 1),
            "evaluate_s": round(time.perf_counter() - trained, 1),
            "failed_seeds": {str(seed): str(error) for seed, error in failed.items()},
            "comparisons": [one for table in tables[:1] for one in comparisons(table, row)],
            "tables": [report_of(table).to_json_dict(table) for table in tables],
        }
    except Exception as err:  # noqa: BLE001  whatever it is, it is of this cell, and told at the end
        lines = traceback.format_exception(err)
        return record | {"status": _FAILED, "error": f"{type(err).__name__}: {err}", "traceback": "".join(lines)}


def _folders(out: Path, cell: Cell, n_seeds: int) -> list[Path]:
    return [out / "runs" / cell.file_stem / f"seed{seed}" for seed in range(n_seeds)]


def _put_aside(folder: Path) -> None:
    n = 1
    while (aside := folder.with_name(f"{folder.name}.interrupted-{n}")).exists():
        n += 1
    folder.rename(aside)


def _told(record: Mapping[str, Any]) -> str:
    if record["status"] == _FAILED:
        return f"FAILED, {record['error'].splitlines()[0]}"
    failed = f"; seeds {', '.join(record['failed_seeds'])} failed" if record["failed_seeds"] else ""
    return f"trained in {record['train_s']:.0f} s, evaluated in {record['evaluate_s']:.0f} s{failed}"


# -- what is there already


def _settings(cell: Cell, n_seeds: int, n_draws: int) -> dict[str, Any]:
    """All that decides the numbers of a cell; as JSON gives it back."""
    experiment = to_dict(cell.experiment)
    del experiment["seed"]
    plain = {
        "experiment": experiment,
        "n_seeds": n_seeds,
        "n_draws": n_draws,
        "data_digest": digest_of(cell.experiment, cell.adata),
    }
    plain["digest"] = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()
    return json.loads(json.dumps(plain))


def _known(out: Path, cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of this cell, if it has one, of these settings and data."""
    path = out / "cells" / f"{cell.file_stem}.json"
    record = json.loads(path.read_text()) if path.exists() else None
    if record is not None and record["status"] == _DONE and record["settings"]["digest"] != settings["digest"]:
        differ = [key for key in settings if key != "digest" and record["settings"].get(key) != settings[key]]
        raise ValueError(
            f"{path} holds results of other settings or data ({', '.join(differ)}); they are not mixed. Use another "
            "folder for out."
        )
    for seed, folder in enumerate(_folders(out, cell, settings["n_seeds"])):
        if (folder / "experiment.json").exists() and read_experiment(folder) != replace(cell.experiment, seed=seed):
            raise ValueError(f"{folder} holds a run of other settings than {cell.name} has now. Use another folder.")
    return record


def _admit(out: Path) -> None:
    foreign = out.is_dir() and not (out / "cells").is_dir() and any(p.name != ".lock" for p in out.iterdir())
    if foreign or (out.exists() and not out.is_dir()):
        raise ValueError(f"out {out} holds something else than results of a benchmark; choose a new folder.")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
