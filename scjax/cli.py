"""The command line: scjax demo | train | predict | evaluate | show. Options come from the dataclasses, by tyro."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from scjax import __version__
from scjax.check import suggestion
from scjax.config import override, to_dict, to_json
from scjax.experiment import Experiment, read_experiment

__all__ = ["main"]

_Settings: TypeAlias = Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Fit scIMF to a shipped time series without one time point, predict it, compare with baselines, draw figures.

    Attributes:
        seeds: trainings with different seeds; the table then shows their spread.
        out: a new folder for all that is written; if left out, the first free one of scjax-demo, scjax-demo-2, ...
    """

    seeds: int = 1
    out: Path | None = None

    def execute(self) -> None:
        from scjax.demo import demo

        demo(n_seeds=self.seeds, out=self.out)


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
        data: .h5ad or .zarr.
        out: folder of the run; a new one, unless --resume.
        resume: continue the run in `out`, with the same data; its settings are read from there unless given.
        step: of the checkpoint to resume from; the newest if left out.
        experiment: the settings.
    """

    preset: str | None = None
    config: Path | None = None
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    data: Path
    out: Path
    resume: bool = False
    step: int | None = None
    experiment: _Settings

    def execute(self) -> None:
        from scjax.experiment import train
        from scjax.train.hooks import Progress

        _print_settings("train", self, to_dict(self.experiment))
        adata = _read(self.data)
        bar = Progress(self.experiment.sampling.n_cells, force=True)
        done = train(self.experiment, adata, self.out, resume=self.resume, step=self.step, hooks=[bar])
        print(f"{int(done.state.step)} steps; the run is in {self.out}. Next:")
        if done.data.split.held_out:
            print(f"  scjax evaluate --runs {self.out} --data {self.data} --out evaluation.json")
        times = " ".join(f"{t:g}" for t in done.data.split.held_out or done.data.times[-1:])
        print(f"  scjax predict --run {self.out} --data {self.data} --times {times} --out predicted.h5ad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Simulate the cells of the first time to other times; writes an .h5ad. No observed target is needed.

    Attributes:
        run: folder of the trained run.
        data: .h5ad or .zarr with cells of the first training time.
        times: in the unit of the data, increasing; they need not have been observed.
        out: the .h5ad to write; an existing file is not overwritten.
        n_cells: of the simulated population; each first cell once if left out.
        seed: of the noise, and of the draw of cells.
        step: of the checkpoint; the newest if left out.
        velocity: write the observed cells of `data` with their velocities instead of a prediction; without --times,
            and without chance.
    """

    run: Path
    data: Path
    times: tuple[float, ...] = ()
    out: Path
    n_cells: int | None = None
    seed: int = 0
    step: int | None = None
    velocity: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def execute(self) -> None:
        from scjax import predict

        _check_out(self.out, ".h5ad")
        if self.velocity == bool(self.times):
            raise ValueError("give --times for a prediction, or --velocity for the velocities of observed cells.")
        if self.velocity and (self.n_cells is not None or self.seed):
            raise ValueError("--n-cells and --seed are of a prediction; with --velocity leave them out.")
        trained = predict.load(self.run, self.step)
        _print_settings("predict", self, trained.about["experiment"])
        adata = _read(self.data)
        if self.velocity:
            written = predict.velocity(trained, adata)
        else:
            written = predict.predict(trained, adata, self.times, n_cells=self.n_cells, seed=self.seed)
        beside = self.out.with_name(self.out.name + ".part")  # a file under its own name is a whole one
        written.write_h5ad(beside)
        beside.rename(self.out)
        print(f"{written.n_obs} cells x {written.n_vars} genes from step {trained.step} written to {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare trained runs with baselines and with real cells on their held-out times; prints a table for each.

    Attributes:
        runs: FOLDER or NAME=FOLDER of each run. Runs of one name are seeds of one model and share a row of the table;
            the name is scIMF if left out.
        data: the file that they were trained on.
        out: a JSON file for the numbers; an existing file is not overwritten.
        n_cells: cells of each population in each comparison; the smallest population if left out.
        n_draws: repeated draws of cells.
        seed: of the draws and the simulations.
        step: of the checkpoints; the newest of each run if left out.
    """

    runs: tuple[str, ...]
    data: Path
    out: Path | None = None
    n_cells: int | None = None
    n_draws: int = 5
    seed: int = 0
    step: int | None = None

    def execute(self) -> None:
        from scjax.experiment import evaluate
        from scjax.metrics.report import render, to_json_dict, verdict

        runs: dict[str, list[Path]] = {}
        for given in self.runs:
            name, equals, folder = given.partition("=")
            if equals and not Path(given).exists():
                runs.setdefault(name, []).append(Path(folder))
            else:
                runs.setdefault("scIMF", []).append(Path(given))
        if not runs:
            raise ValueError("--runs must name at least one folder of a run.")
        if self.out is not None:
            _check_out(self.out, ".json")
        _print_settings(
            "evaluate", self, {name: to_dict(read_experiment(folders[0])) for name, folders in runs.items()}
        )
        tables = evaluate(
            runs, _read(self.data), n_cells=self.n_cells, n_draws=self.n_draws, seed=self.seed, step=self.step
        )
        for table in tables:
            print(render(table))
            print("\n".join(verdict(table, name, metric.name) for name in runs for metric in table.metrics) + "\n")
        if self.out is not None:
            self.out.write_text(json.dumps([to_json_dict(table) for table in tables], indent=1) + "\n")
            print(f"numbers written to {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Tell what a preset, a run, a settings file or a data file holds; without an argument, list the presets.

    Attributes:
        what: name of a preset, folder of a run, .json, .h5ad or .zarr.
        settings: of a preset, a run or a .json: only its settings, as JSON for `scjax train --config`.
    """

    what: Annotated[str, tyro.conf.Positional] = ""
    settings: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def execute(self) -> None:
        print(to_json(_settings(self.what)) if self.settings else _shown(self.what), end="")


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
                {"demo": Demo, "train": Train, "predict": Predict, "evaluate": Evaluate, "show": Show},
                prog="scjax",
                description="Generative models of single-cell populations. `scjax COMMAND --help` tells its options.",
                args=arguments,
            )
        command.execute()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("scjax: interrupted. A run goes on from its newest checkpoint with --resume.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, ArithmeticError, OSError) as err:
        notes = "".join(f"\n{note}" for note in getattr(err, "__notes__", ()))
        print(f"scjax: {err}{notes}", file=sys.stderr)
        raise SystemExit(2) from err


def _parse_train(arguments: list[str]) -> Train:
    """The settings decide the defaults of the options, so a look at where they come from goes first."""
    from scjax import presets

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--config", "--out"):
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
    assignments = [a for a in seen.set if a is not None]
    for assignment in assignments:
        if "=" not in assignment:
            raise ValueError(f"--set takes KEY=VALUE, such as model.n_heads=1; got {assignment!r}.")
    # All at once: the fields of another kind of split are only whole together.
    chosen = override(experiment, dict(a.split("=", 1) for a in assignments))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Chosen(Train):
        experiment: _Settings = chosen

    Chosen.__doc__ = Train.__doc__
    return tyro.cli(Chosen, prog="scjax train", args=arguments)


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
        lines = [f"{name:<20} {presets.preset(name).summary}" for name in presets.names()]
        return "\n".join(["presets:", *lines, "`scjax show NAME` tells the rest.\n"])
    if what in presets.names():
        found = presets.preset(what)
        told = [f"{f.name}: {getattr(found, f.name)}" for f in dataclasses.fields(found) if f.name != "experiment"]
        return "\n".join([what, *told, to_json(found.experiment)])
    path = Path(what)
    if not path.exists():
        raise ValueError(
            f"{what} is neither a file or folder nor a preset.{suggestion(what, presets.names())} "
            f"The presets: {', '.join(presets.names())}."
        )
    if path.suffix in (".h5ad", ".zarr"):
        return _shown_data(path)
    return _shown_run(path) if path.is_dir() else to_json(read_experiment(path))


def _shown_data(path: Path) -> str:
    adata = _read(path)
    lines = [f"{path}: {adata.n_obs} cells x {adata.n_vars} genes"]
    for column in adata.obs:
        counts = adata.obs[column].value_counts().sort_index()
        shown = ", ".join(f"{v} ({n})" for v, n in counts.items()) if len(counts) <= 20 else f"{len(counts)} values"
        lines.append(f"  obs {column}: {shown}")
    for kind in ("layers", "obsm", "uns"):
        keys = [str(k) for k in getattr(adata, kind) if k is not None]
        if keys:
            lines.append(f"  {kind}: {', '.join(keys)}")
    return "\n".join(lines) + "\n"


def _shown_run(path: Path) -> str:
    from scjax import checkpoint

    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    about = checkpoint.read_about(folder)
    lines = [
        f"{path}: {about['kind']}, run {about['run']}",
        f"  checkpoints: steps {', '.join(map(str, checkpoint.list_steps(folder)))}",
        f"  data: {about['data']['n_cells']} cells, digest {about['data']['digest']}",
        f"  trained on times {about['split']['train']}, held out {about['split']['held_out']}",
        f"  genes: {len(about['transform']['feature_names'])}",
        f"  made with: {', '.join(f'{name} {v}' for name, v in about['provenance']['versions'].items())}",
    ]
    return "\n".join([*lines, json.dumps(about["experiment"], indent=2)]) + "\n"


def _print_settings(name: str, command: Any, experiment: dict[str, Any]) -> None:
    """The command's own options and all settings of the experiment, as JSON."""
    own = {f.name: getattr(command, f.name) for f in dataclasses.fields(command) if f.name != "experiment"}
    print(json.dumps({name: own, "experiment": experiment}, indent=2, default=str), flush=True)


def _read(path: Path) -> Any:
    from scjax.data.source import read_anndata

    try:
        return read_anndata(path)
    except (ValueError, OSError):
        raise
    except Exception as err:  # whatever anndata says about an element that it cannot read; the note names the file
        raise ValueError(f"{err} {' '.join(getattr(err, '__notes__', ()))}") from err


def _check_out(out: Path, suffix: str) -> None:
    if out.exists():
        raise ValueError(f"out {out} exists already and is not overwritten; choose another name.")
    if out.suffix != suffix:
        raise ValueError(f"out must end in {suffix}; got {str(out)!r}.")
    if not out.parent.is_dir():
        raise ValueError(f"out {out} would lie in a folder that does not exist; make {out.parent} first.")
