"""How fast are cells read from disk, how much memory does training on them take, and does it wait for them?

    python benchmarks/out_of_core.py rates
    python benchmarks/out_of_core.py memory
    python benchmarks/out_of_core.py waits

Files are made here and removed: counts, a tenth of them not zero, of controls and 20 perturbations in 16 contexts, with
eight times besides, so that one file serves all three systems. They lie in the page cache afterwards: what is timed is
the work of reading, not a disk.

rates: 512 random cells at a time, dense float32: as anndata reads its backed files (uncompressed, gzip, zarr v3 in
shards), as scjax reads the same files, from memory, and from the cells that a run on disk prepares and keeps, which is
what training reads. Besides, what it costs to prepare them. Sides take turns.

memory: the peak of a process that trains on a file, and of one that predicts from it, at one size and at ten times as
many cells, left on disk; beside it the larger one read into memory.

waits: the loop's own metric, at the sizes of the training benchmarks (`jobs/`): the seconds that it waited for batches.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import numpy as np

SYSTEMS = ("scimf", "scdfm", "perturbdiff")
LIMIT = 1.2  # of the peak at ten times the cells to that at one
N_PERTURBATIONS, N_KINDS, N_DONORS, N_TIMES = 21, 4, 4, 8
MIB = 2**20


def make(path: Path, n_cells: int, n_genes: int, density: float, *, compression: str | None = None) -> None:
    """Some cells at a time, through the writer of anndata for each part of the file."""
    import anndata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    per_cell = max(1, int(density * n_genes))
    indices = np.sort(rng.integers(0, n_genes, (n_cells, per_cell), np.int32), axis=1)
    counts = rng.geometric(0.5, (n_cells, per_cell)).astype(np.float32)
    matrix = sparse.csr_matrix(
        (counts.ravel(), indices.ravel(), np.arange(n_cells + 1) * per_cell), shape=(n_cells, n_genes)
    )
    matrix.sum_duplicates()
    words = lambda letter, n: pd.Categorical.from_codes(rng.integers(0, n, n_cells), [f"{letter}{i}" for i in range(n)])  # noqa: E731
    obs = pd.DataFrame({"kind": words("k", N_KINDS), "donor": words("d", N_DONORS)})
    obs["drug"] = words("p", N_PERTURBATIONS).rename_categories({"p0": "control"})
    obs["time"] = rng.integers(0, N_TIMES, n_cells).astype(np.float64)
    obs.index = [f"c{i}" for i in range(n_cells)]
    adata = anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))
    if path.suffix == ".zarr":
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path, compression=compression)


# -- rates


def rates(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from scjax.data.expression import transform_all
    from scjax.data.preprocess import Preprocess, fit
    from scjax.data.source import open_source, read_anndata
    from scjax.data.spec import DataSpec

    files = {name: folder / name for name in ("plain.h5ad", "gzip.h5ad", "shards.zarr")}
    for name, path in files.items():
        make(path, args.cells, args.genes, args.density, compression="gzip" if name.startswith("gzip") else None)
    spec = DataSpec(space="counts", time="time")
    on_disk = {name: open_source(read_anndata(path, backed=True), spec) for name, path in files.items()}
    memory = open_source(read_anndata(files["plain.h5ad"]), spec)
    steps = Preprocess(scale=False, n_components=None)
    transform = fit(steps, memory.rows(np.arange(2)), memory.feature_names, "counts")
    prepared = {}
    for name, source in on_disk.items():
        wall, cpu = time.perf_counter(), time.process_time()
        stored = transform_all(source, transform, folder / "cells" / name)
        taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        prepared[name] = {f"cells_per_{unit}": args.cells / seconds for unit, seconds in taken.items()}
        prepared[name]["bytes"] = sum(path.stat().st_size for path in stored.folder.iterdir())
    sides: dict[str, Callable[[np.ndarray], Any]] = {"prepared cells": stored.__getitem__, "memory": memory.rows}
    sides |= {f"scjax, {name}": source.rows for name, source in on_disk.items()}
    sides |= {f"anndata, {name}": _anndata_rows(path) for name, path in files.items()}
    rng = np.random.default_rng(1)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, read in sides.items():
            wall, cpu, n = time.perf_counter(), time.process_time(), 0
            while n == 0 or time.perf_counter() - wall < args.seconds:
                assert read(rng.integers(0, args.cells, args.batch)).shape == (args.batch, args.genes)
                n += args.batch
            taken[name].append((n / (time.perf_counter() - wall), n / (time.process_time() - cpu)))
    found = {
        name: {
            "cells_per_wall_s": {"median": float(np.median(wall)), "min": min(wall), "max": max(wall)},
            "cells_per_cpu_s": {"median": float(np.median(cpu)), "min": min(cpu), "max": max(cpu)},
        }
        for name, (wall, cpu) in ((name, tuple(zip(*pairs, strict=True))) for name, pairs in taken.items())
    }
    print(f"{'random cells, ' + str(args.batch) + ' at a time':32} cells/s  cells/CPU s")
    for name, rate in found.items():
        print(f"  {name:30} {rate['cells_per_wall_s']['median']:9,.0f} {rate['cells_per_cpu_s']['median']:9,.0f}")
    for name, rate in prepared.items():
        print(f"  preparing {name:20} {rate['cells_per_wall_s']:9,.0f} {rate['cells_per_cpu_s']:9,.0f}")
    return {"reading": found, "preparing": prepared}


def _anndata_rows(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """What anndata does with the rows of a file that stays on disk, in the order that suits it."""
    import h5py
    import zarr
    from anndata.io import sparse_dataset

    group = zarr.open_group(path, mode="r") if path.suffix == ".zarr" else h5py.File(path)
    matrix = sparse_dataset(group["X"])

    def rows(asked: np.ndarray) -> np.ndarray:
        order, place = np.unique(asked, return_inverse=True)
        return np.asarray(matrix[order].toarray(), np.float32)[place]

    return rows


# -- memory


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    files = {}
    for times in (1, 10):
        files[times] = folder / f"{times}.h5ad"
        make(files[times], times * args.cells, args.genes, args.density)
    found: dict[str, Any] = {"file_bytes": {str(times): path.stat().st_size for times, path in files.items()}}
    for system in args.systems:
        peaks: dict[str, Any] = {}
        for times, path in files.items():
            peaks[f"train {times}x"] = _peak("train", system, path, folder / f"{system}-{times}", "--on-disk")
            run = folder / f"{system}-{times}"
            peaks[f"predict {times}x"] = _peak("predict", system, path, run, "--on-disk")
        if args.in_memory:
            peaks["train 10x in memory"] = _peak("train", system, files[10], folder / f"{system}-memory")
        ratios = {
            what: peaks[f"{what} 10x"]["peak_rss_bytes"] / peaks[f"{what} 1x"]["peak_rss_bytes"]
            for what in ("train", "predict")
        }
        found[system] = {"peaks": peaks, "ratios": ratios}
        told = ", ".join(f"{what} {peak['peak_rss_bytes'] / MIB:,.0f} MiB" for what, peak in peaks.items())
        print(f"{system}: {told}; 10x / 1x: " + ", ".join(f"{w} {r:.2f}" for w, r in ratios.items()), flush=True)
    return found


def _peak(what: str, system: str, file: Path, run: Path, *options: str) -> dict[str, float]:
    """Of a process of its own."""
    command = [sys.executable, __file__, "worker", what, system, str(file), str(run), *options]
    kept = os.environ | {"PYTHONPATH": os.pathsep.join([str(harness.ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) | {"wall_s": time.perf_counter() - started}


def work(args: argparse.Namespace) -> None:
    """The life of a process whose memory is asked for."""
    from scjax import predict
    from scjax.data.source import read_anndata
    from scjax.experiment import train

    adata = read_anndata(args.file, backed=args.on_disk)
    if args.what == "train":
        train(small(args.system), adata, args.run)
    else:
        wanted = [3.0, 7.0] if args.system == "scimf" else [f"p{i}" for i in range(1, 6)]
        options = {} if args.system == "scimf" else {"contexts": _contexts(args.system)}
        made = predict.predicting(predict.load(args.run), adata, wanted, n_cells=512, **options)
        made.write(args.run.with_name(args.run.name + ".predicted.h5ad"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak_rss_bytes": harness.peak_bytes(), "cpu_s": usage.ru_utime + usage.ru_stime}))


def _contexts(system: str) -> list[str]:
    return [f"k{i}" if system == "scdfm" else f"k{i} | d{i}" for i in range(3)]


def small(system: str) -> Any:
    """A network that trains in seconds: what is asked is what the data take."""
    from scjax.data.preprocess import Preprocess
    from scjax.data.sampling import CellSetSampling, PairedSampling, TimeSeriesSampling
    from scjax.data.spec import DataSpec
    from scjax.data.splits import HoldOutCrossed, HoldOutTimes, LeaveOut
    from scjax.experiment import CellSetExperiment, PerturbationExperiment, TimeSeriesExperiment
    from scjax.models import perturbdiff, scdfm, scimf
    from scjax.predict import GenerationConfig, SetGenerationConfig

    loop = {"n_steps": 6, "scan_steps": 2, "log_every": 2, "checkpoint_every": 6}
    if system == "scimf":
        return TimeSeriesExperiment(
            model=scimf.Config(n_dims=20, dt=0.5),
            spec=DataSpec(space="counts", time="time"),
            split=HoldOutTimes(times=(3.0,)),
            preprocess=Preprocess(n_top_genes=200, n_components=20),
            sampling=TimeSeriesSampling(n_cells=128, n_targets=128),
            **loop,
        )
    steps = Preprocess(scale=False, n_components=None)
    if system == "scdfm":
        return PerturbationExperiment(
            model=scdfm.Config(d_model=16, n_layers=1, n_heads=2, graph_heads=2),
            spec=DataSpec(space="counts", perturbation="drug", covariates=("kind",)),
            split=LeaveOut(covariate="kind", value="k1"),
            preprocess=steps,
            sampling=PairedSampling(n_cells=16, n_genes=100),
            generation=GenerationConfig(n_steps=1, solver="euler"),
            **loop,
        )
    return CellSetExperiment(
        model=perturbdiff.Config(d_model=64, n_layers=1, n_heads=2, n_times=50),
        spec=DataSpec(
            space="counts", perturbation="drug", cell_type="kind", batch="donor", covariates=("kind", "donor")
        ),
        split=HoldOutCrossed(covariates=("donor",), values=(("d3",),), conditions=("p1", "p2")),
        preprocess=steps,
        sampling=CellSetSampling(n_sets=2, n_cells=32),
        generation=SetGenerationConfig(n_steps=2),
        **loop,
    )


# -- waits


def waits(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from jobs import scdfm

    from scjax.data.source import read_anndata
    from scjax.experiment import train

    found = {}
    for system in args.systems:
        path = folder / f"{system}.h5ad"
        n_genes = scdfm.N_GENES if system == "scdfm" else args.genes
        make(path, args.cells, n_genes, args.density)
        experiment = published(system, args.steps)
        bar = Timed(experiment.cells_per_step)
        started = time.perf_counter()
        train(experiment, read_anndata(path, backed=True), folder / f"run-{system}", hooks=[bar])
        found[system] = {
            "steps": args.steps,
            "step_s": bar.seconds / args.steps,
            "waited_s": bar.waited,
            "share": bar.waited / bar.seconds,
            "whole_s": time.perf_counter() - started,
        }
        told = found[system]
        print(
            f"{system}: {told['step_s']:.3g} s a step, waited {told['waited_s']:.3g} s ({told['share']:.2%})",
            flush=True,
        )
    return found


def Timed(cells_per_step: int) -> Any:  # noqa: N802 (a class whose base is loaded late)
    from scjax.train.hooks import Progress

    class Told(Progress):
        """The bar, which keeps how long the steps took besides what they waited."""

        def on_end(self) -> None:
            self.seconds = time.perf_counter() - self._started
            super().on_end()

    return Told(cells_per_step)


def published(system: str, n_steps: int) -> Any:
    """The sizes of `train_step.py`."""
    from jobs import perturbdiff, scdfm, scimf

    from scjax.data.preprocess import Preprocess

    loop = {"n_steps": n_steps, "scan_steps": 2, "log_every": 2, "checkpoint_every": n_steps}
    one = small(system)
    if system == "scimf":
        model = type(one.model)(n_dims=scimf.N_DIMS)
        steps = Preprocess(n_components=scimf.N_DIMS)
        sampling = replace(one.sampling, n_cells=scimf.N_CELLS, n_targets=512)
        return replace(one, model=model, preprocess=steps, sampling=sampling, **loop)
    if system == "scdfm":
        model = type(one.model)(d_model=scdfm.D_MODEL, n_layers=scdfm.N_LAYERS, n_heads=scdfm.N_HEADS, remat="layers")
        return replace(one, model=model, sampling=replace(one.sampling, n_cells=4, n_genes=scdfm.N_SUBSET), **loop)
    model = type(one.model)(
        d_model=perturbdiff.D_MODEL, n_layers=perturbdiff.N_LAYERS, n_heads=perturbdiff.N_HEADS, divisor=10.0
    )
    return replace(one, model=model, sampling=replace(one.sampling, n_cells=perturbdiff.N_CELLS), **loop)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="question", required=True)
    sizes = {"rates": 100_000, "memory": 30_000, "waits": 20_000}
    parsers = {name: which.add_parser(name) for name in sizes}
    for name, one in parsers.items():
        one.add_argument("--cells", type=int, default=sizes[name])
        one.add_argument("--genes", type=int, default=2000)
        one.add_argument("--density", type=float, default=0.1)
        one.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
        if name != "rates":
            one.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parsers["rates"].add_argument("--batch", type=int, default=512)
    parsers["rates"].add_argument("--rounds", type=int, default=3)
    parsers["rates"].add_argument("--seconds", type=float, default=2, help="of each side in a round, at least")
    parsers["memory"].add_argument("--in-memory", action=argparse.BooleanOptionalAction, default=True)
    parsers["waits"].add_argument("--steps", type=int, default=20)
    worker = which.add_parser("worker")
    worker.add_argument("what", choices=("train", "predict"))
    worker.add_argument("system", choices=SYSTEMS)
    worker.add_argument("file", type=Path)
    worker.add_argument("run", type=Path)
    worker.add_argument("--on-disk", action="store_true")
    args = parser.parse_args()
    if args.question == "worker":
        work(args)
        return

    with scratch() as folder:
        found = {"rates": rates, "memory": memory, "waits": waits}[args.question](args, folder)
    if args.save:
        shapes = {name: getattr(args, name) for name in ("cells", "genes", "density")}
        record = {"question": f"out of core: {args.question}", "shapes": shapes, "found": found}
        harness.append(harness.environment() | record, harness.RESULTS / f"out_of_core_{args.question}.json")
    if args.question == "memory":
        worst = max(ratio for system in args.systems for ratio in found[system]["ratios"].values())
        if worst > LIMIT:
            raise SystemExit(f"{worst:.2f} times the memory at ten times the cells; the limit is {LIMIT}")


if __name__ == "__main__":
    main()
