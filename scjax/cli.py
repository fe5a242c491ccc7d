"""The command line: scjax demo | train | predict | evaluate | bench | convert | show | info.

tyro makes options of the dataclasses.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

import tyro

from scjax import __version__, predict
from scjax.check import listed, suggestion
from scjax.config import from_text, override, to_dict, to_json
from scjax.experiment import Experiment, read_experiment
from scjax.hosts import PeerError
from scjax.train.loop import Interrupted
from scjax.types import Population
from scjax.whole import made_whole

__all__ = ["main"]

_LARGE = 4 * 2**30  # bytes of files above which data stay on disk
_SOME_CELLS = 2000  # whose values are looked at
_MOST_OF_START = 0.05  # in a moving average, of the parameters that training began with
_FEW, _MANY = 20, 30  # values of a column that are all told; that are told of more

_Data: TypeAlias = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=]FILE")]
_Flag: TypeAlias = Annotated[bool, tyro.conf.FlagCreatePairsOff]
_Settings: TypeAlias = Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Fit a model to shipped data without a part of them, predict that part, compare with baselines, draw figures.

    Attributes:
        model: scimf, a time series without one time point; scdfm, genes activated alone and in pairs, without the pairs
            both of whose genes were seen alone; perturbdiff, kinases silenced in three lines, some of them not in each.
        seeds: trainings with different seeds; the table then shows their spread.
        out: a new folder for all that is written; if left out, the first free one of scjax-demo, scjax-demo-2, ...
    """

    model: Annotated[Literal["scimf", "scdfm", "perturbdiff"], tyro.conf.Positional] = "scimf"
    seeds: int = 1
    out: Path | None = None

    def execute(self) -> None:
        from scjax.demo import demo

        demo(self.model, n_seeds=self.seeds, out=self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train on a data file.

    The settings are those of a preset or of a JSON file, then --set, then the options below. The defaults shown are
    the chosen preset's (without one, scimf/klein's).

    Attributes:
        preset: name of a preset; `scjax show` lists them.
        config: a JSON file of settings, as `scjax show NAME --settings` prints it.
        set: any setting by its dotted name; repeatable. Also another kind of split, by
            --set split.kind=HoldOutTimes --set 'split.times=[2, 4]'
        data: .h5ad or .zarr; repeatable: files of the same genes that are read as one, or for cell sets sources named
            by their files, or by NAME (files of one name are one source).
        on_disk: leave the data on disk, whatever their size; without this option files of more than 4 GiB stay there.
        in_memory: read the data into memory, whatever their size.
        out: folder of the run; a new one, unless --resume.
        resume: continue the run in `out`, with the same data; its settings are read from there unless given.
        step: of the checkpoint to resume from; the newest if left out.
        verbose: print all settings first.
        vectors: a table of external vectors of the perturbations (.csv, .tsv, .npz, .h5ad, .parquet; or names and
            SMILES), for --model.perturbation vector; put where spec.vectors looks for it.
        keep: newest checkpoints that stay.
        tensorboard: also log to OUT/tensorboard, for `tensorboard --logdir`; needs the extra `logging`.
        devices: of this machine, that share each step; one if left out. With several processes all devices of all.
        shard_above: spread parameters and optimiser states of so many entries or more over the devices.
        coordinator: HOST:PORT of the first of several processes, each of which runs this command; together with
            --n-processes and --process-id. In their place the environment may name them: JAX_COORDINATOR_ADDRESS,
            JAX_NUM_PROCESSES, JAX_PROCESS_ID.
        n_processes: of all machines.
        process_id: of this one, from 0; that one writes.
        detect_processes: instead, ask the cluster that started the processes (SLURM, Open MPI, Kubernetes, TPU pods).
        experiment: the settings.
    """

    preset: str | None = None
    config: Path | None = None
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    data: _Data = ()
    on_disk: _Flag = False
    in_memory: _Flag = False
    out: Path
    resume: bool = False
    step: int | None = None
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    vectors: Path | None = None
    keep: int = 3
    tensorboard: _Flag = False
    devices: int | None = None
    shard_above: int | None = None
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    n_processes: int | None = None
    process_id: int | None = None
    detect_processes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    experiment: _Settings

    def execute(self) -> None:
        from scjax import hosts, mesh
        from scjax.experiment import train
        from scjax.train.hooks import Progress, TensorBoard

        kind = getattr(self.experiment.model, "perturbation", None)
        if self.vectors is not None and kind != "vector":
            raise ValueError(
                f"--vectors {self.vectors} is for --model.perturbation vector; with {kind!r} nothing reads them."
            )
        more = [TensorBoard(self.out / "tensorboard", resumed=self.resume)] if self.tensorboard else []
        several = hosts.start(self.coordinator, self.n_processes, self.process_id, detect=self.detect_processes)
        first = hosts.is_first()
        shared = None if self.devices is None and not several else mesh.make_mesh(self.devices)
        if first:
            self.announce()
        on_disk = _stays_on_disk(self.data, self.on_disk, self.in_memory)

        def read() -> Any:
            adata = _read_data(self.data, self.experiment.kind, on_disk=on_disk)
            _attach(adata, self.vectors, self.experiment.spec)
            return adata

        adata = hosts.together(read, "Reading the data")
        bar = Progress(self.experiment.cells_per_step, force=True)
        options = {"keep": self.keep, "mesh": shared, "shard_above": self.shard_above}
        done = train(
            self.experiment, adata, self.out, resume=self.resume, step=self.step, hooks=[bar, *more], **options
        )
        if not first:
            return
        predicts = done.state.step if done.state.best is None else done.state.best.step
        if began := _share_of_start(self.experiment, int(predicts)):
            none = "--ema-decay None"
            if hasattr(self.experiment, "ema_every"):
                none += " --ema-every 1 --ema-start initial"
            print(
                f"predictions use a moving average of the parameters, {began:.0%} of which is still what training "
                f"began with: train longer, or with {none}"
            )
        lines = _next_commands(self.experiment, done, self.out, self.data, self.vectors)
        print(f"{int(done.state.step)} steps; the run is in {self.out}.{' Next:' if lines else ''}")
        for line in lines:
            print(f"  {line}")

    def announce(self) -> None:
        title = predict.model_title(self.experiment.model)
        where = self.out / "experiment.json"
        _announce(f"train {title}: settings go to {where}", self.verbose, self, to_dict(self.experiment))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict cells that nobody observed; writes .h5ad or .zarr. What is asked for depends on the kind of the run.

    A run on a time series takes --times (or --velocity), a run on perturbations or on cell sets --conditions and those
    of the options after it that are marked with its kind, or with neither.

    Attributes:
        run: folder of the trained run.
        data: .h5ad or .zarr with the cells to start from: those of the first training time, or controls. Repeatable for
            runs on cell sets of several sources, which are told by NAME, else by the file's name; for others, files of
            the same genes are read as one.
        on_disk: leave the data on disk, whatever their size; without this option files of more than 4 GiB stay there.
        in_memory: read the data into memory, whatever their size.
        out: the .h5ad or .zarr to write, as the cells are made; nothing that exists is overwritten.
        n_cells: of the simulated population, each first cell once if left out; or of each condition and context, the
            run's own number if left out.
        seed: of the noise, and of the draw of cells.
        step: of the checkpoint; the newest if left out.
        devices: of this machine, that share the cells of a prediction; one if left out. The population of a time series
            (--n-cells) must be a multiple of them.
        verbose: print all settings of the run first.
        ensemble: folders of other runs of the same experiment, with other seeds: instead of cells the mean of each
            condition or time is written, over cells and runs, and how far the runs part (layers sd, lowest, highest).
        interval: perturbations and cell sets: a chance, such as 0.9. The means are written, also of one run, with
            intervals (layers low, high) that hold the means of the observed cells with this chance. Populations of
            `data` that the split kept for validation calibrate them: `scjax.experiment.predict_intervals`.
        times: time series: in the unit of the data, increasing; they need not have been observed.
        velocity: time series: write the observed cells of `data` with their velocities instead of a prediction; without
            --times, and without chance.
        bases: with --velocity: embeddings to draw it in, umap for obsm["X_umap"].
        partners: with --velocity: of each cell so many that it attends to most, in obsp["interaction"].
        observed: perturbations, cell sets: another .h5ad or .zarr to write, for tools that compare two files: the
            observed cells of the conditions, in the form of the prediction. Both files then hold the control cells too.
        conditions: what to do to the cells, A or A+B, in any order; they need not have been observed.
        contexts: the values of the covariates, joined by " | ", to do it in; all that have controls if left out.
        on_unknown: what stands for a condition that training never saw.
        vectors: a table of external vectors, as for `scjax train`, for perturbations that training never saw.
        n_steps: of the solver or the sampler; the run's own if left out, as for all that follow.
        guidance: above 1 exaggerates what the condition does.
        zero_below: generated expression below it is set to zero.
        chunk: perturbations, cell sets: cells (32) or sets (8) that are generated at once; more are faster on a GPU and
            take memory. A multiple of the devices. The noise of a cell of perturbations depends on it.
        genes: perturbations: names of the genes to generate; all that training kept if left out.
        solver: perturbations: of the flow.
        composition: perturbations: "joint" asks the network for a combination, "additive" adds up what its parts do.
        set_size: cell sets: the most cells that are generated as one set.
        sampler: cell sets: of the diffusion.
        spacing: cell sets: "respaced" spreads the steps over all times, "truncated" takes the first ones.
        eta: cell sets: noise in the steps of "ddim".
    """

    run: Path
    data: _Data = ()
    on_disk: _Flag = False
    in_memory: _Flag = False
    out: Path
    n_cells: int | None = None
    seed: int = 0
    step: int | None = None
    devices: int | None = None
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    ensemble: tuple[Path, ...] = ()
    interval: float | None = None
    times: tuple[float, ...] = ()
    velocity: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    bases: tuple[str, ...] = ()
    partners: int | None = None
    observed: Path | None = None
    conditions: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    on_unknown: Literal["error", "mean", "nearest"] = "error"
    vectors: Path | None = None
    n_steps: int | None = None
    guidance: float | None = None
    zero_below: float | None = None
    chunk: int | None = None
    genes: tuple[str, ...] = ()
    solver: Literal["rk4_38", "euler", "heun", "tsit5"] | None = None
    composition: Literal["joint", "additive"] | None = None
    set_size: int | None = None
    sampler: Literal["ddim", "ddpm"] | None = None
    spacing: Literal["respaced", "truncated"] | None = None
    eta: float | None = None

    def execute(self) -> None:
        from scjax.data.writer import check_new_file
        from scjax.mesh import make_mesh
        from scjax.predict.timeseries import predicting_velocity

        check_new_file(self.out)
        if self.observed is not None:
            check_new_file(self.observed)
            if self.observed.resolve() == self.out.resolve():
                raise ValueError(f"--out and --observed are two files; both are {self.out}.")
        trained: Any = predict.load(self.run, self.step)  # of the kind that is looked up next
        kind = trained.about["experiment"]["kind"]
        self.check_options(kind)
        mesh = None if self.devices is None else make_mesh(self.devices)
        title = predict.model_title(trained.config)
        told = f"predict with {title}, run {trained.about['run']}, step {trained.step}: settings in {self.run}"
        _announce(told, self.verbose, self, trained.about["experiment"])
        on_disk = _stays_on_disk(self.data, self.on_disk, self.in_memory)
        adata = _read_data(self.data, kind, trained.about, on_disk=on_disk)
        _attach(adata, self.vectors, trained.spec, every=False)
        if self.ensemble or self.interval is not None:
            self.means(kind, adata, mesh)
            return
        real = None
        if self.velocity:
            made = predicting_velocity(trained, adata, bases=self.bases, n_partners=self.partners)
        elif kind == "TimeSeriesExperiment":
            made = predict.predicting(trained, adata, self.times, **self.how(kind, mesh))
        else:
            given = self.how(kind, mesh)
            made = predict.predicting(trained, adata, self.conditions, **given)
            if self.observed is not None:
                which: dict[str, Any] = {"contexts": given["contexts"], "genes": made.genes}
                real = predict.observing(trained, adata, self.conditions, **which)
                made = made.then(predict.observing(trained, adata, **which))
            _tell_unseen(made.uns["scjax"])
        written = made.write(self.out)
        print(f"{written.n_obs} cells x {written.n_vars} genes from step {trained.step} written to {self.out}")
        if real is not None and self.observed is not None:
            print(f"{real.write(self.observed).n_obs} observed cells of the same genes written to {self.observed}")

    def how(self, kind: str, mesh: Any) -> dict[str, Any]:
        """The options of `predict` for this kind."""
        more = () if kind == "TimeSeriesExperiment" else ("contexts", "on_unknown", *_HOW, *_OPTIONS[kind])
        given = {name: getattr(self, name) for name in ("n_cells", "seed", *more)}
        given = {name: None if value == () else value for name, value in given.items()}
        if self.chunk is None:
            given.pop("chunk", None)  # each kind has its own
        return given | {"mesh": mesh}

    def means(self, kind: str, adata: Any, mesh: Any) -> None:
        from scjax.data.writer import write_cells
        from scjax.experiment import predict_intervals
        from scjax.predict.ensemble import load_members, predict_means

        members = load_members((self.run, *self.ensemble))
        given = self.how(kind, mesh)
        if self.interval is None:
            found = predict_means(members, adata, self.conditions or self.times, **given)
        else:
            found = predict_intervals(members, adata, self.conditions, level=self.interval, **given)
        write_cells(self.out, found)
        _tell_unseen(found.uns["scjax"])
        layers = ", ".join(name for name in found.layers if name)
        print(f"{found.n_obs} means x {found.n_vars} genes over {len(members)} runs written to {self.out}: X, {layers}")
        if note := json.loads(found.uns["scjax"].get("conformal", "{}")).get("note"):
            print(f"the intervals are infinite: {note}")

    def check_options(self, kind: str) -> None:
        is_series = kind == "TimeSeriesExperiment"
        of_kind = {
            "TimeSeriesExperiment": ("a time series", "--times", ("times", "velocity", "bases", "partners")),
            "PerturbationExperiment": ("perturbations", "--conditions", _OPTIONS["PerturbationExperiment"]),
            "CellSetExperiment": ("cell sets", "--conditions", _OPTIONS["CellSetExperiment"]),
        }
        of_perturbations = ("conditions", "contexts", "on_unknown", "vectors", "observed", "interval", *_HOW)
        all_options = {*of_perturbations}.union(*(names for *_, names in of_kind.values()))
        title, wants, allowed = of_kind[kind]
        allowed = {*allowed, *(() if is_series else of_perturbations)}
        wrong = [
            f.name
            for f in dataclasses.fields(self)
            if f.name in all_options - allowed and getattr(self, f.name) != f.default
        ]
        if wrong:
            raise ValueError(
                f"--{wrong[0].replace('_', '-')} is not of this run: {self.run} was trained on {title}, "
                f"which takes {wants}."
            )
        if is_series and self.velocity == bool(self.times):
            raise ValueError("give --times for a prediction, or --velocity for the velocities of observed cells.")
        if self.velocity and (self.n_cells is not None or self.seed or self.devices is not None):
            raise ValueError("--n-cells, --seed and --devices are of a prediction; with --velocity leave them out.")
        if not self.velocity and (self.bases or self.partners is not None):
            raise ValueError("--bases and --partners are of the velocities of observed cells; they need --velocity.")
        if not is_series and not self.conditions:
            raise ValueError("give --conditions for a prediction, such as A or A+B.")
        if self.ensemble or self.interval is not None:
            cells = [name for name in ("step", "velocity", "observed") if getattr(self, name)]
            if cells:
                raise ValueError(
                    f"--{cells[0]} does nothing with --ensemble or --interval, which write means; leave it out."
                )


def _tell_unseen(about: Mapping[str, str]) -> None:
    """What training never saw of what was asked for; nothing for a time series."""
    for name, stand_in in json.loads(about.get("replaced", "{}")).items():
        print(f"{name} was in no training population; in its place: {stand_in}")
    for name, told in json.loads(about.get("unseen", "{}")).items():
        print(f"{name}: {told}")


_HOW = ("n_steps", "guidance", "zero_below", "chunk")  # options of predictions of every kind of perturbation model
_OPTIONS = {
    "PerturbationExperiment": ("genes", "solver", "composition"),
    "CellSetExperiment": ("set_size", "sampler", "spacing", "eta"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare predictions with baselines and with real cells; prints the tables, and writes a report.

    Either trained runs on what they held out (--runs, --data), or files of predicted cells, of whatever tool, beside
    the file of the real ones (--predicted, --real, --space, and --perturbation or --time).

    Attributes:
        runs: FOLDER or NAME=FOLDER of each run. Runs of one name are seeds of one model and share a row of the table;
            the name is that of the model if left out.
        data: the file that the runs were trained on, or the files, as they were given then.
        predicted: FILE or NAME=FILE of predicted cells, .h5ad or .zarr. Files of one name are seeds of one model; the
            name is the file's if left out.
        real: the file of the real cells: those that were predicted, and those of training, for the baselines.
        space: files: what the numbers are: "lognormalised" (log1p of normalised counts), "counts", or for a time series
            "latent". It is never guessed.
        expression: files: where the numbers are: X, layers/NAME or obsm/NAME.
        perturbation: files: the obs column of what was done to a cell, A or A+B in any order.
        control: files: the names that mean that nothing was done; control and ctrl if left out.
        separator: files: what joins the names of a combination in the real file, and in the predicted ones, where
            --predicted-spec separator=+ does not say otherwise.
        contexts: files: the obs columns (cell type, line, batch) within which controls are matched.
        time: files: the obs column of times, in place of --perturbation.
        predicted_spec: files: what the predicted files call it, where that differs: perturbation=COLUMN, time=COLUMN,
            expression=obsm/NAME, 'covariates=["COLUMN"]', control=NAME; repeatable.
        genes: files: "same" refuses files of other genes than the real ones, "shared" compares those that all have.
        allow: files: nan, negative: predicted values that are otherwise refused.
        split: files: a JSON of a split (split.json of a run): its test part is compared, its training part is what the
            baselines know. Without it they know all that `real` holds besides what is predicted.
        training: files: instead, COLUMN=VALUE of the training cells of `real`.
        n_components: files of a time series: compare in so many principal components of the training cells.
        out: a new folder for the report (report.html), tidy tables (.csv) and all numbers (results.json); or a JSON
            file for the numbers alone. Nothing is overwritten.
        formats: of the tidy tables: csv, parquet (needs pyarrow).
        n_cells: cells of each population in each comparison; by the smallest population if left out.
        n_draws: repeated draws of cells.
        seed: of the draws, and of the predictions of runs.
        step: runs: of the checkpoints; the newest of each run if left out.
        on_unknown: runs on perturbations, cell sets: what stands for a condition that training never saw.
        vectors: runs on perturbations, cell sets: the table of external vectors that they were trained with.
        verbose: print all settings of the runs, or all options, first.
    """

    runs: tuple[str, ...] = ()
    data: _Data = ()
    predicted: tuple[str, ...] = ()
    real: Path | None = None
    space: Literal["lognormalised", "counts", "latent"] | None = None
    expression: str = "X"
    perturbation: str | None = None
    control: tuple[str, ...] = ()
    separator: str = "+"
    contexts: tuple[str, ...] = ()
    time: str | None = None
    predicted_spec: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    genes: Literal["same", "shared"] = "same"
    allow: tuple[Literal["nan", "negative"], ...] = ()
    split: Path | None = None
    training: Annotated[str | None, tyro.conf.arg(metavar="COLUMN=VALUE")] = None
    n_components: int | None = None
    out: Path | None = None
    formats: tuple[Literal["csv", "parquet"], ...] = ("csv",)
    n_cells: int | None = None
    n_draws: int = 5
    seed: int = 0
    step: int | None = None
    on_unknown: Literal["error", "mean", "nearest"] = "error"
    vectors: Path | None = None
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def execute(self) -> None:
        from scjax import page
        from scjax.data.leaks import Findings
        from scjax.experiment import report_of
        from scjax.experiment.tidy import check_formats

        if bool(self.runs) == bool(self.predicted):
            raise ValueError(
                "give --runs with at least one folder, and --data, for trained runs; or --predicted with at least one "
                "file, and --real, for predicted cells."
            )
        of_other = _OF_FILES if self.runs else _OF_RUNS
        wrong = [f.name for f in dataclasses.fields(self) if f.name in of_other and getattr(self, f.name) != f.default]
        if wrong:
            given, other = ("--runs", "--predicted") if self.runs else ("--predicted", "--runs")
            raise ValueError(f"--{wrong[0].replace('_', '-')} is of evaluations by {other}; this one has {given}.")
        if self.out is not None and self.out.suffix == ".json":
            _check_out(self.out, ".json")
        elif self.out is not None:
            page.check_folder(self.out)
        check_formats(self.formats)
        kept: list[Any] | None = [] if self.out is not None and self.out.suffix != ".json" else None
        tables, models = self.of_runs(kept) if self.runs else self.of_files(kept)
        print(Findings.from_json_dict(tables[0].provenance["findings"]).render() + "\n")
        for table in tables:
            report = report_of(table)
            print(report.render(table))
            lines = (report.verdict(table, name, metric.name) for name in models for metric in table.metrics)
            print("\n".join(lines) + "\n")
        if kept is not None and self.out is not None:
            page.write(self.out, tables, kept, formats=self.formats)
            print(f"report, tables and numbers written to {self.out}; open {self.out / 'report.html'} in a browser")
        elif self.out is not None:
            numbers = [report_of(table).to_json_dict(table) for table in tables]
            with made_whole(self.out) as beside:
                beside.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
            print(f"numbers written to {self.out}")

    def of_runs(self, keep: list[Any] | None) -> tuple[list[Any], list[str]]:
        from scjax.experiment import evaluate

        runs: dict[str, list[Path]] = {}
        settings: dict[str, Experiment] = {}
        for given in self.runs:
            name, folder = _named_path(given)
            found = read_experiment(folder)
            name = name or predict.model_title(found.model)
            settings.setdefault(name, found)
            runs.setdefault(name, []).append(folder)
        more = {}
        if any(found.kind != "TimeSeriesExperiment" for found in settings.values()):
            more = {"on_unknown": self.on_unknown}
        elif self.on_unknown != "error":
            raise ValueError("--on-unknown is of runs on perturbations; these are of time series.")
        told = "; ".join(f"{name}: {', '.join(map(str, folders))}" for name, folders in runs.items())
        _announce(f"evaluate {told}", self.verbose, self, {name: to_dict(settings[name]) for name in runs})
        first = next(iter(runs))
        adata = _read_data(self.data, settings[first].kind, _about(runs[first][0]))
        _attach(adata, self.vectors, settings[first].spec)
        draws = {"n_cells": self.n_cells, "n_draws": self.n_draws, "seed": self.seed}
        return evaluate(runs, adata, step=self.step, keep=keep, **draws, **more), list(runs)

    def of_files(self, keep: list[Any] | None) -> tuple[list[Any], list[str]]:
        from scjax.data.spec import DataSpec
        from scjax.experiment import evaluate_files

        for name in ("real", "space"):
            if getattr(self, name) is None:
                raise ValueError(f"--predicted needs --{name}; see `scjax evaluate --help`.")
        control: dict[str, Any] = {"control": self.control} if self.control else {}
        spec = DataSpec(
            expression=self.expression,
            space=self.space,  # pyright: ignore[reportArgumentType]
            perturbation=self.perturbation,
            time=self.time,
            covariates=self.contexts,
            separator=self.separator,
            **control,
        )
        theirs = override(spec, _assignments("predicted-spec", self.predicted_spec, "perturbation=condition"))
        files: dict[str, list[Path]] = {}
        for given in self.predicted:
            name, file = _named_path(given)
            files.setdefault(name or file.stem, []).append(file)
        training = None
        if self.training is not None:
            key, equals, value = self.training.partition("=")
            if not equals:
                raise ValueError(f"--training takes COLUMN=VALUE, such as split=train; got {self.training!r}.")
            training = (key, value)
        told = "; ".join(f"{name}: {', '.join(map(str, paths))}" for name, paths in files.items())
        _announce(f"evaluate {told}; real cells: {self.real}", self.verbose, self, to_dict(spec))
        tables = evaluate_files(
            files,
            self.real,
            spec=spec,
            predicted_spec=theirs,
            genes=self.genes,
            allow=self.allow,
            split=self.split,
            training=training,
            n_components=self.n_components,
            n_cells=self.n_cells,
            n_draws=self.n_draws,
            seed=self.seed,
            keep=keep,
        )
        return tables, list(files)


_OF_RUNS = ("data", "step", "on_unknown", "vectors")
_OF_FILES = ("real", "space", "expression", "perturbation", "control", "separator", "contexts", "time")
_OF_FILES += ("predicted_spec", "genes", "allow", "split", "training", "n_components")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Train the systems on real data sets, each split of each with several seeds, and compare them with all baselines.

    Results are kept one by one: the same command goes on where it was interrupted. What goes wrong in one training is
    told at the end, with status 1, and loses no other.

    Attributes:
        out: folder for results, runs and the report; a new one, or that of an interrupted benchmark.
        data: a folder of further data sets, recognised by their files' names; without it those that ship with scjax.
        seeds: trainings of each, with different seeds, in one compiled program.
        systems: which.
        only: patterns of SYSTEM/VARIANT/DATA/SPLIT, such as 'scimf/*/klein/*'; --dry-run lists them all.
        n_steps: of every training, in place of its own; to try things out.
        together: seeds that share a program and its memory at most; all if left out.
        dry_run: list what would be run, and what is done.
    """

    out: Path
    data: Path | None = None
    seeds: int = 3
    systems: tuple[Literal["scimf", "scdfm", "perturbdiff"], ...] = ("scimf", "scdfm", "perturbdiff")
    only: tuple[str, ...] = ()
    n_steps: int | None = None
    together: int | None = None
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def execute(self) -> None:
        from scjax.bench import bench, listed
        from scjax.train.hooks import Progress

        what = {name: getattr(self, name) for name in ("data", "systems", "only", "n_steps")}
        if self.dry_run:
            print(listed(self.out, **what))
            return
        done = bench(
            self.out,
            **what,
            n_seeds=self.seeds,
            together=self.together,
            tell=lambda line: print(line, flush=True),
            hooks=lambda experiment: [Progress(experiment.cells_per_step)],
        )
        print(f"\n{done.report}\nwritten to {self.out}: results.json, report.md, cells/, runs/")
        if done.failed:
            print(f"scjax: {len(done.failed)} of the cells failed: {', '.join(done.failed)}", file=sys.stderr)
            raise SystemExit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Make a checkpoint of a file of weights of a PyTorch program, or such a file of a checkpoint.

    FILE --out FOLDER reads weights of scIMF, scDFM or PerturbDiff, all or nothing; FOLDER --to-torch FILE writes those
    of a run, or of a converted checkpoint, under the names of the PyTorch program. Nothing is overwritten.

    Attributes:
        what: .pt, .pth, .ckpt or .bin (with torch), .npz, .safetensors; or the folder of a run or of a converted
            checkpoint.
        out: a new folder for the checkpoint.
        to_torch: a new .pt, .pth or .npz.
        model: whose weights these are; told by the names of the tensors if left out.
        weights: of a file with a moving average: ema or last (main is what the file predicts with, the average where
            Lightning kept one). Of a run: last, ema or best.
        vocabulary: a JSON of what ids mean. scDFM: its {"<pad>": 0, ...}. PerturbDiff: {"perturbation": [...],
            "cell_type": [...], "batch": [...]}, those that are known, in the order of its dictionaries.
        genes: PerturbDiff: the names of its genes in its order, one a line in a .txt, or those of an .h5ad or .zarr.
        set: what tensors do not tell, a field of the model's config, such as n_heads=4; and for PerturbDiff the columns
            of the data to predict from, such as spec.perturbation=drug; repeatable.
        step: of the run's checkpoint; the newest if left out.
    """

    what: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    to_torch: Path | None = None
    model: Literal["scimf", "scdfm", "perturbdiff"] | None = None
    weights: Literal["main", "ema", "last", "best"] | None = None
    vocabulary: Path | None = None
    genes: Path | None = None
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    step: int | None = None

    def execute(self) -> None:
        if (self.out is None) == (self.to_torch is None):
            raise ValueError(
                "give --out, a new folder, for a file of weights; or --to-torch, a new file, for a folder."
            )
        backwards = self.out is None
        of_other = ("model", "vocabulary", "genes", "set") if backwards else ("step",)
        wrong = [f.name for f in dataclasses.fields(self) if f.name in of_other and getattr(self, f.name) != f.default]
        if wrong:
            raise ValueError(f"--{wrong[0]} does nothing with {'--to-torch' if backwards else '--out'}; leave it out.")
        if self.out is not None:
            self.to_folder(self.out)
        elif self.to_torch is not None:
            self.to_file(self.to_torch)

    def to_file(self, path: Path) -> None:
        from scjax import convert

        if self.weights == "main":
            raise ValueError("--weights of a run are last, ema or best; got main.")
        convert.check_new(path)
        loaded = convert.load(self.what, self.step, weights=self.weights)
        state = convert.to_torch(loaded.weights)
        convert.write_torch(path, state)
        count = sum(tensor.size for tensor in state.values())
        print(f"{len(state)} tensors, {count} values, from step {loaded.step} written to {path}")

    def to_folder(self, folder: Path) -> None:
        from scjax import convert
        from scjax.data.spec import DataSpec

        if folder.exists():
            raise ValueError(f"out {folder} exists already and is not overwritten; choose another name.")
        if self.weights == "best":
            raise ValueError("--weights of a file are main, ema or last; got best.")
        chosen = _assignments("set", self.set, "n_heads=4")
        columns = {key.partition(".")[2]: v for key, v in chosen.items() if key.startswith("spec.")}
        spec = None
        if columns:
            blank = DataSpec(space="lognormalised", perturbation="perturbation")
            spec = to_dict(override(blank, columns))
            if "perturbation" not in columns:
                raise ValueError("--set spec.perturbation=COLUMN must come with other columns of the data.")
        known = {key: from_text(v, key) for key, v in chosen.items() if not key.startswith("spec.")}
        reserved = sorted(known.keys() & {"state", "system"})
        if reserved:
            raise ValueError(
                f"--set takes fields of the model's config; {reserved[0]!r} is none (--model: the system)."
            )
        vocabulary = None if self.vocabulary is None else _read_json(self.vocabulary)
        genes = () if self.genes is None else _read_genes(self.genes)
        state = convert.read_torch(self.what, weights=self.weights or "main")
        weights = convert.from_torch(state, self.model, **known)
        source = {"source": self.what.name, "sha256": convert.digest(self.what)}
        convert.save(folder, weights, **source, genes=genes, vocabulary=vocabulary, spec=spec)
        print(convert.told(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path} is no valid JSON: {err}.") from err
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; it is {type(found).__name__}.")
    return found


def _read_genes(path: Path) -> tuple[str, ...]:
    if path.suffix in (".h5ad", ".zarr"):
        return tuple(map(str, _read(path, on_disk=True).var_names))
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Tell what a preset, a run, a checkpoint, a file of settings, split or data holds; without an argument, list the
    presets.

    Attributes:
        what: name of a preset, folder of a run or of a checkpoint, .json of settings or of a split, .h5ad or .zarr.
        settings: of a preset, a run or a .json: only its settings, as JSON for `scjax train --config`.
    """

    what: Annotated[str, tyro.conf.Positional] = ""
    settings: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def execute(self) -> None:
        print(to_json(_settings(self.what)) if self.settings else _shown(self.what), end="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Print versions, devices and flags as a block for a bug report, without names of users, machines or files."""

    def execute(self) -> None:
        from scjax.info import information

        print(f"```\n{information()}```")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a user's mistake ends with its message and status 2, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        print(f"scjax {__version__}")
        return
    try:
        if arguments[:1] == ["train"]:
            command = _parse_train(arguments[1:])
        else:
            command = tyro.extras.subcommand_cli_from_dict(
                {
                    "demo": Demo,
                    "train": Train,
                    "predict": Predict,
                    "evaluate": Evaluate,
                    "bench": Bench,
                    "convert": Convert,
                    "show": Show,
                    "info": Info,
                },
                prog="scjax",
                description="Generative models of single-cell populations. `scjax COMMAND --help` tells its options.",
                args=arguments,
            )
        # Training and the benchmark have their own answer to SIGTERM.
        with contextlib.nullcontext() if arguments[:1] in (["train"], ["bench"], ["demo"]) else _tidily():
            command.execute()
    except Interrupted as err:
        again = _again(arguments)
        print(f"scjax: {err}", file=sys.stderr)
        if not again:
            raise SystemExit(1) from None
        print(f"To go on:\n  {again}", file=sys.stderr, flush=True)
        raise SystemExit(0) from None
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("scjax: interrupted. A run goes on from its newest checkpoint with --resume.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, ArithmeticError, OSError, ImportError, PeerError) as err:
        notes = "".join(f"\n{note}" for note in (*getattr(err, "__notes__", ()), *_as_options(str(err), arguments)))
        print(f"scjax: {err}{notes}", file=sys.stderr)
        raise SystemExit(2) from err


@contextlib.contextmanager
def _tidily() -> Iterator[None]:
    """SIGTERM ends the command as an error does: what is half written is removed. In the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set by Python


_OF_PROCESSES = ("--coordinator", "--n-processes", "--process-id")


def _again(arguments: list[str]) -> str:
    """The command that goes on where this one was interrupted; none for those that cannot."""
    if arguments[:1] == ["train"]:
        given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        given.add_argument("--out")
        given.add_argument("--data", action="append", default=[])
        for name in ("--vectors", "--keep", "--devices", "--shard-above", *_OF_PROCESSES):
            given.add_argument(name)
        for name in ("--on-disk", "--in-memory", "--tensorboard", "--detect-processes"):
            given.add_argument(name, action="store_true")
        seen = vars(given.parse_known_args(arguments[1:])[0])
        out, data = seen.pop("out"), seen.pop("data")
        arguments = ["train", "--resume", "--out", out, *(word for one in data for word in ("--data", one))]
        for name, value in seen.items():
            if value:  # no setting of the run: those are read from its folder
                arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return shlex.join(["scjax", *arguments]) if arguments[:1] in (["train"], ["bench"]) else ""


def _as_options(message: str, arguments: list[str]) -> list[str]:
    """How a command spells the settings that a message of the library names as `name=value`, or begins with."""
    spelled = {name: option.replace("_", "-") for name, option in _spelled(arguments).items()}
    named = {name: f"{name}=..." for name in re.findall(r"(?<![\w.-])([a-z]\w*(?:\.\w+)?)=(?=[\w'\[(-])", message)}
    first = re.match(r"([a-z]\w*(?:\.\w+)?)(?= must | names |: )", message)
    named = ({first[1]: first[1]} if first else {}) | named
    options = [f"{told} is {spelled[name]}" for name, told in named.items() if name in spelled]
    return [f"In the command line: {', '.join(options)}."] if options else []


def _spelled(arguments: list[str]) -> dict[str, str]:
    """The options of the command by the names that the library has for them; without names that several may mean."""
    from scjax.data.spec import DataSpec

    commands: dict[str, type] = {"train": Train, "predict": Predict, "evaluate": Evaluate}
    if not arguments or arguments[0] not in commands:
        return {}
    own = {field.name for field in dataclasses.fields(commands[arguments[0]])}
    if arguments[0] == "evaluate":
        return {name: f"--{name}" for name in own - {*(_OF_RUNS if "--predicted" in arguments else _OF_FILES)}}
    renamed = {"path": "--data", "n_devices": "--devices"}
    if arguments[0] == "predict":
        alone = {"directory": "--run"} if "--ensemble" not in arguments else {}
        return {name: f"--{name}" for name in own} | renamed | alone
    found: dict[str, set[str]] = {}
    for kind in get_args(Experiment):
        for name, hint in get_type_hints(kind).items():
            found.setdefault(name, set()).add(f"--{name}")
            for cls in (hint, *get_args(hint)):
                for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
                    found[f"{name}.{field.name}"] = {f"--{name}.{field.name}"}
                    found.setdefault(field.name, set()).add(f"--{name}.{field.name}")
    of_spec = {field.name: f"--spec.{field.name}" for field in dataclasses.fields(DataSpec)}  # what data are checked by
    clear = {name: min(options) for name, options in found.items() if len(options) == 1}
    return clear | {name: f"--{name}" for name in own} | of_spec | renamed | {"workdir": "--out"}


def _parse_train(arguments: list[str]) -> Train:
    """The settings decide the defaults of the options, so a look at where they come from goes first."""
    from scjax import presets

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--config", "--out", "--vectors"):
        peek.add_argument(name, nargs="?")
    peek.add_argument("--set", action="append", nargs="?", default=[])
    for name in ("--resume", "--help", "-h"):
        peek.add_argument(name, action="store_true")
    seen, _ = peek.parse_known_args(arguments)
    if seen.preset and seen.config:
        raise ValueError(f"--preset {seen.preset} and --config {seen.config} exclude each other; give one.")
    if seen.config:
        experiment = read_experiment(seen.config)
    elif seen.preset or seen.help or seen.h:
        experiment = presets.preset(seen.preset or "scimf/klein").experiment
    elif seen.resume and seen.out:
        experiment = read_experiment(seen.out)
    else:
        raise ValueError(
            f"train needs --preset NAME or --config FILE.json. The presets: {', '.join(presets.names())}. "
            "`scjax show NAME` prints one, `scjax train --help` the options."
        )
    # All at once: the fields of another kind of split are only whole together.
    given = _assignments("set", [a for a in seen.set if a is not None], "model.n_heads=1")
    if seen.vectors and experiment.spec.vectors is None:
        given.setdefault("spec.vectors", "vectors")
    chosen = override(experiment, given)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Chosen(Train):
        experiment: Annotated[tyro.conf.AvoidSubcommands[type(chosen)], tyro.conf.arg(name="")] = chosen  # pyright: ignore[reportInvalidTypeForm]

    Chosen.__doc__ = Train.__doc__
    return tyro.cli(Chosen, prog="scjax train", args=arguments)


def _assignments(option: str, given: Sequence[str], example: str) -> dict[str, str]:
    for assignment in given:
        if "=" not in assignment:
            raise ValueError(f"--{option} takes KEY=VALUE, such as {example}; got {assignment!r}.")
    return dict(assignment.split("=", 1) for assignment in given)


def _named_path(given: str) -> tuple[str, Path]:
    """NAME=PATH; a path that has the sign itself is one, if it is there."""
    name, equals, path = given.partition("=")
    return (name, Path(path)) if equals and not Path(given).exists() else ("", Path(given))


def _settings(what: str) -> Experiment:
    from scjax import presets

    if what in presets.names():
        return presets.preset(what).experiment
    if not what or Path(what).suffix in (".h5ad", ".zarr"):
        raise ValueError(f"--settings needs a preset, the folder of a run, or a .json; got {what!r}.")
    return read_experiment(what)


def _shown(what: str) -> str:
    from scjax import presets

    if not what:
        width = max(map(len, presets.names()))
        lines = [f"{name:<{width}}  {presets.preset(name).summary}" for name in presets.names()]
        return "\n".join(["presets:", *lines, "`scjax show NAME` tells the rest.\n"])
    if what in presets.names():
        found = presets.preset(what)
        told = [f"{f.name}: {getattr(found, f.name)}" for f in dataclasses.fields(found) if f.name != "experiment"]
        return "\n".join([what, *told, to_json(found.experiment)])
    path = Path(what)
    if not path.exists():
        if path.suffix in (".h5ad", ".zarr", ".json"):
            raise ValueError(f"there is no file {what}.")
        raise ValueError(
            f"{what} is neither a file or folder nor a preset.{suggestion(what, presets.names())} "
            f"The presets: {', '.join(presets.names())}."
        )
    if path.suffix in (".h5ad", ".zarr"):
        return _shown_data(path)
    if path.is_dir():
        return _shown_run(path)
    if path.suffix != ".json":
        raise ValueError(
            f"{what} cannot be shown: give a preset, the folder of a run or a checkpoint, .json of settings or of a "
            "split, .h5ad or .zarr."
        )
    return _shown_json(path)


def _shown_json(path: Path) -> str:
    """Settings, or a split with its rule."""
    from scjax.data.splits import load_split

    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        tree = None  # read_experiment says what is wrong
    if not isinstance(tree, dict) or not {"rule", "train"} <= tree.keys():
        return to_json(read_experiment(path))
    told = to_dict(load_split(path))
    return "\n".join([f"{path}: a split", *_shown_split(told), json.dumps(told["rule"], indent=2)]) + "\n"


def _shown_data(path: Path) -> str:
    adata = _read(path, _size(path) > _LARGE)
    lines = [f"{path}: {adata.n_obs} cells x {adata.n_vars} genes", *_shown_record(adata.uns)]
    ours = "scjax" in adata.uns  # whose record says what the numbers are
    lines += [f"  X: {_shown_values(adata.X, ours)}"] if adata.X is not None else []
    lines += [f"  obs {column}: {_shown_column(adata.obs[column])}" for column in adata.obs]
    lines += [f"  layers {name}: {_shown_values(adata.layers[name], ours)}" for name in adata.layers if name]
    for kind in ("obsm", "obsp", "uns"):
        keys = [str(k) for k in getattr(adata, kind, ()) if k is not None]
        if keys:
            lines.append(f"  {kind}: {', '.join(keys)}")
    return "\n".join(lines) + "\n"


def _shown_values(matrix: Any, range_alone: bool) -> str:
    """What the numbers of the first cells look like: whether they are counts is what --spec.space asks first."""
    import numpy as np

    from scjax.data.spec import LARGEST_LOG

    try:
        some = matrix[: min(_SOME_CELLS, matrix.shape[0])]
    except ValueError:  # genes by cells on disk, of which no rows can be read
        return "not looked at"
    values = np.asarray(some.data if hasattr(some, "indptr") else some)
    if values.dtype.kind not in "buif":
        return "not numbers"
    if not values.any():
        return "zeros" if np.prod(some.shape) else "empty"
    low, high = values.min(), values.max()
    if values.size < np.prod(some.shape):
        low, high = min(low, 0), max(high, 0)
    if not np.isfinite([low, high]).all():
        return "holds values that are not finite"
    kind = "of any sign: scaled, or a latent"
    if low >= 0 and (values == np.round(values)).all():
        kind = "whole numbers: counts" if high > 1 else "0 and 1"
    elif low >= 0:
        kind = "log-normalised, by their size" if high <= LARGEST_LOG else "normalised, too large for logarithms"
    told = f"{low:g} to {high:g}" + ("" if range_alone else f", {kind}")
    return told + (f" (the first {_SOME_CELLS} cells)" if matrix.shape[0] > _SOME_CELLS else "")


def _shown_record(uns: Any) -> list[str]:
    """Of a prediction: what made it."""
    made = uns.get("scjax")
    if made is None:
        return []
    if "runs" in made:  # the means of several
        runs, steps = json.loads(made["runs"]), json.loads(made["steps"])
    else:
        runs, steps = [made["run"]], [made["step"]]
    of = ", ".join(f"run {run}, step {step}" for run, step in zip(runs, steps, strict=True))
    told = [f"  made by scjax {made['version']}, {of}: {made['space']}"]
    if "conformal" in made:
        how = json.loads(made["conformal"])
        told.append(f"  intervals of level {how['level']}, calibrated on {listed(how['calibration'])}")
    return told


def _shown_column(values: Any) -> str:
    """Every value with its cells where there are few, the most frequent of many words."""
    counts = values.value_counts()
    if len(counts) <= _FEW:
        return ", ".join(f"{v} ({n})" for v, n in counts.sort_index().items())
    if values.dtype.kind in "biuf" or counts.iloc[0] == 1:
        return f"{len(counts)} values"
    most = ", ".join(f"{v} ({n})" for v, n in counts.iloc[:_MANY].items())
    return f"{len(counts)} values, the most frequent: {most}{', ...' if len(counts) > _MANY else ''}"


def _shown_run(path: Path) -> str:
    """A run, the folder of its checkpoints, or that of one of them."""
    from scjax import checkpoint

    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps, wanted = checkpoint.list_steps(folder), None
    if not steps and path.name.isdecimal() and int(path.name) in checkpoint.list_steps(path.resolve().parent):
        folder, wanted = path.resolve().parent, int(path.name)
        steps = (wanted,)
    if not steps and (path / "experiment.json").exists():
        settings = to_json(read_experiment(path))
        return "\n".join([f"{path}: a run without a checkpoint yet", *_shown_log(path), settings])
    damaged, newest = [], None
    for step in reversed(steps):
        try:
            found = checkpoint.read(folder, step)
        except ValueError as err:
            damaged.append(f"  DAMAGED, step {step}: {err}")
            continue
        newest = newest or found
    # Without any the document says what is wrong: no checkpoint, or none that is whole.
    about = newest.about if newest else checkpoint.read_about(folder, wanted)
    if "converted" in about:
        from scjax import convert

        return f"{convert.told(path)}\n{json.dumps(about['model'], indent=2)}\n"
    lines = [
        f"{path}: {about['kind']}, run {about['run']}",
        f"  checkpoints: steps {', '.join(map(str, steps))}",
        *damaged,
        *_shown_log(path),
        *([_shown_parameters(newest)] if newest else []),
        f"  data: {about['data']['n_cells']} cells, digest {about['data']['digest']}",
        *_shown_split(about["split"]),
        f"  genes: {len(about['transform']['feature_names'])}",
        *([f"  started from run {p['run']}, step {p['step']}"] if (p := about.get("pretrained")) else []),
        f"  made with: {', '.join(f'{name} {v}' for name, v in about['provenance']['versions'].items())}",
    ]
    return "\n".join([*lines, json.dumps(about["experiment"], indent=2)]) + "\n"


def _shown_parameters(found: Any) -> str:
    import jax

    from scjax.predict.record import predicting_params

    leaves = jax.tree.leaves(predicting_params(found.arrays["state"]))
    return f"  parameters: {sum(leaf.size for leaf in leaves):,} in {len(leaves)} arrays (step {found.step})"


def _shown_log(run: Path) -> list[str]:
    """The last whole line of the log of a run, and whether it failed."""
    from scjax.train.hooks import read_log

    lines = read_log(run / "metrics.jsonl")
    told = []
    if lines:
        last = {name: value for name, value in lines[-1].items() if name not in ("step", "seconds", "waited")}
        values = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
        told.append(f"  log: {len(lines)} lines, the last of step {lines[-1]['step']}: {values}")
    if (run / "failed.json").exists():
        failed = json.loads((run / "failed.json").read_text(encoding="utf-8"))
        told.append(f"  FAILED: {failed['message']}")
    return told


def _shown_split(split: dict[str, Any]) -> list[str]:
    if "held_out" in split:
        return [f"  trained on times {split['train']}, held out {split['held_out']}"]

    def shown(populations: list[Any]) -> str:
        names = [str(Population(tuple(names), context)) for names, context in populations]
        return f"{len(names)} populations: {', '.join(names[:_MANY])}{', ...' if len(names) > _MANY else ''}"

    told = {"trained on": split["train"], "validated on": split["validation"], "held out": split["test"]}
    return [f"  {what} {shown(populations)}" for what, populations in told.items() if populations]


def _share_of_start(experiment: Experiment, n_steps: int) -> float:
    """Of the parameters that the moving average began with, after so many steps; 0 where it is small or none is."""
    if experiment.ema_decay is None:
        return 0.0
    updates = -(-n_steps // getattr(experiment, "ema_every", 1))  # after the steps 0, ema_every, 2 ema_every, ...
    if getattr(experiment, "ema_start", "initial") == "first_step":
        updates -= 1
    share = experiment.ema_decay ** max(updates, 0)
    return share if share > _MOST_OF_START else 0.0


def _next_commands(
    experiment: Experiment, done: Any, out: Path, data: Sequence[str], vectors: Path | None
) -> list[str]:
    data = [shlex.quote(one) for one in data]
    split = done.data.split
    series = hasattr(split, "held_out")
    held_out = split.held_out if series else split.test
    commands = []
    if getattr(experiment.model, "perturbation", "") == "none":  # it knows of no perturbation that could be asked for
        control = shlex.quote(experiment.spec.control_names[0])
        if not (experiment.spec.is_unperturbed or experiment.sampling.include_control):  # pyright: ignore[reportAttributeAccessIssue]
            return []
        return [f"scjax predict --run {out} --data {data[0]} --conditions {control} --out predicted.h5ad"]
    data = " --data ".join(data) + (f" --vectors {shlex.quote(str(vectors))}" if vectors is not None else "")
    if held_out:
        commands.append(f"scjax evaluate --runs {out} --data {data} --out evaluation.json")
    if series:
        wanted = f"--times {' '.join(f'{t:g}' for t in held_out or done.data.times[-1:])}"
    else:
        perturbed = [p for p in held_out or split.train if not p.is_control]
        wanted = f"--conditions {' '.join(dict.fromkeys(shlex.quote(p.condition) for p in perturbed[:3]))}"
    return [*commands, f"scjax predict --run {out} --data {data} {wanted} --out predicted.h5ad"]


def _announce(line: str, verbose: bool, command: Any, experiment: dict[str, Any]) -> None:
    """One line; or the command's own options and all settings of the experiment, as JSON."""
    if not verbose:
        print(f"scjax {line} (--verbose prints all settings)", flush=True)
        return
    own = {f.name: getattr(command, f.name) for f in dataclasses.fields(command) if f.name != "experiment"}
    name = type(command).__name__.lower() if not isinstance(command, Train) else "train"
    print(json.dumps({name: own, "experiment": experiment}, indent=2, default=str), flush=True)


def _about(run: Path) -> dict[str, Any]:
    from scjax import checkpoint

    return checkpoint.read_about(run / "checkpoints" if (run / "checkpoints").is_dir() else run)


def _stays_on_disk(given: Sequence[str], on_disk: bool, in_memory: bool) -> bool:
    if on_disk and in_memory:
        raise ValueError("--on-disk and --in-memory exclude each other; give one.")
    if on_disk or in_memory:
        return on_disk
    size = sum(_size(_named_path(one)[1]) for one in given)
    if size > _LARGE:
        print(
            f"{size / 2**30:.1f} GiB of data stay on disk (more than {_LARGE >> 30}; --in-memory reads them)",
            flush=True,
        )
    return size > _LARGE


def _size(path: Path) -> int:
    if path.is_dir() and path.suffix == ".zarr":
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0  # reading says what is wrong


def _read_data(given: Sequence[str], kind: str, about: dict[str, Any] | None = None, *, on_disk: bool = False) -> Any:
    """One AnnData, or for cell sets of named sources a list of them with their names.

    `about`: of the run that is to read them; without one, a single file without a name is no named source.
    """
    if not given:
        raise ValueError("give --data, the .h5ad or .zarr with the cells.")
    named = []
    for one in given:
        named.append(_named_path(one))
    has_name = any(name for name, _ in named)
    if kind != "CellSetExperiment":
        if has_name:
            raise ValueError(f"--data {' --data '.join(given)}: named files are for cell sets only.")
        return _read([file for _, file in named] if len(named) > 1 else named[0][1], on_disk)
    is_one = len(named) == 1 and not has_name if about is None else about["names"]["sources"] == [""]
    if is_one and len(named) == 1:
        return _read(named[0][1], on_disk)
    return [(name or file.stem, _read(file, on_disk)) for name, file in named]


def _read(path: Path | list[Path], on_disk: bool = False) -> Any:
    from scjax.data.source import read_anndata

    try:
        return read_anndata(path, backed=on_disk)
    except (ValueError, OSError):
        raise
    except Exception as err:  # whatever anndata says about an element that it cannot read; the note names the file
        raise ValueError(f"{err} {' '.join(getattr(err, '__notes__', ()))}") from err


def _attach(adata: Any, vectors: Path | None, spec: Any, *, every: bool = True) -> None:
    from scjax.data import embeddings

    if vectors is None:
        return
    if spec.vectors is None:
        raise ValueError(f"--vectors {vectors}: this run knows of no external vectors (spec.vectors=None).")
    table = embeddings.read_table(vectors, separator=spec.separator, control=spec.control_names)
    several = isinstance(adata, list)  # of cell sets, whose columns only joining completes
    for one in [one for _, one in adata] if several else [adata]:
        embeddings.attach(one, table, spec, every=every and not several)


def _check_out(out: Path, suffix: str) -> None:
    if out.exists():
        raise ValueError(f"out {out} exists already and is not overwritten; choose another name.")
    if out.suffix != suffix:
        raise ValueError(f"out must end in {suffix}; got {str(out)!r}.")
    if not out.parent.is_dir():
        raise ValueError(f"out {out} would lie in a folder that does not exist; make {out.parent} first.")
