"""The command line: scjax demo | train | predict | evaluate | show. Options come from the dataclasses, by tyro."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from scjax import __version__
from scjax.config import override, to_json
from scjax.experiment import Experiment, read_experiment

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Fit scIMF to a shipped time series without one time point, predict it, compare with baselines, draw figures.

    Attributes:
        seeds: trainings with different seeds; the table then shows their spread.
        out: a new folder for everything that is written; if left out, the first free one of scjax-demo, scjax-demo-2 ...
    """

    seeds: int = 1
    out: Path | None = None

    def run(self) -> None:
        from scjax.demo import demo

        demo(n_seeds=self.seeds, out=self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train on a data file. Settings: a preset or a JSON file, then --set, then the options below.

    Attributes:
        data: .h5ad or .zarr.
        out: folder of the run, new unless --resume.
        resume: continue the run in `out`, with the same settings and data.
    """

    data: Path
    out: Path
    resume: bool = False
    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]

    def run(self) -> None:
        from scjax.data.source import read_anndata
        from scjax.experiment import train
        from scjax.train.hooks import Progress

        print(to_json(self.experiment), end="")
        bar = Progress(self.experiment.sampling.n_cells, force=True)
        done = train(self.experiment, read_anndata(self.data), self.out, resume=self.resume, hooks=[bar])
        print(
            f"{int(done.state.step)} steps; the run is in {self.out}. Next: scjax evaluate --runs {self.out} "
            f"--data {self.data} --out {self.out}-evaluation.json"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Simulate the cells of the first time to other times; writes an .h5ad. No observed target is needed.

    Attributes:
        run_folder: of a trained run.
        data: .h5ad or .zarr with cells of the first training time.
        times: in the unit of the data.
        out: the .h5ad to write; an existing file is not overwritten.
        n_cells: of the simulated population; each first cell once if left out.
        seed: of the noise, and of the draw of cells.
        step: of the checkpoint; the newest if left out.
        velocity: write the observed cells of `data` with their velocities instead; `times` is then not used.
    """

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    data: Path
    times: tuple[float, ...] = ()
    out: Path
    n_cells: int | None = None
    seed: int = 0
    step: int | None = None
    velocity: bool = False

    def run(self) -> None:
        from scjax import predict
        from scjax.data.source import read_anndata

        _refuse_existing(self.out)
        if self.velocity == bool(self.times):
            raise ValueError("give --times for a prediction, or --velocity for the velocities of observed cells.")
        trained = predict.load(self.run_folder, self.step)
        print(json.dumps(trained.about["experiment"], indent=2))
        adata = read_anndata(self.data)
        if self.velocity:
            written = predict.velocity(trained, adata)
        else:
            written = predict.predict(trained, adata, self.times, n_cells=self.n_cells, seed=self.seed)
        written.write_h5ad(self.out)
        print(f"{written.n_obs} cells x {written.n_vars} genes from step {trained.step} written to {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare trained runs with baselines and with real cells on their held-out times; prints a table for each.

    Attributes:
        runs: folders of runs that differ in their seed only.
        data: the file that they were trained on.
        out: a JSON file for the numbers; an existing file is not overwritten.
        n_cells: cells of each population in each comparison; the smallest population if left out.
        n_draws: repeated draws of cells.
        seed: of the draws and the simulations.
    """

    runs: tuple[Path, ...]
    data: Path
    out: Path | None = None
    n_cells: int | None = None
    n_draws: int = 5
    seed: int = 0

    def run(self) -> None:
        from scjax.data.source import read_anndata
        from scjax.experiment import evaluate
        from scjax.metrics.report import render, to_json_dict, verdict

        if not self.runs:
            raise ValueError("runs must name at least one folder of a run.")
        if self.out is not None:
            _refuse_existing(self.out)
        print(to_json(read_experiment(self.runs[0])), end="")
        tables = evaluate(
            self.runs, read_anndata(self.data), n_cells=self.n_cells, n_draws=self.n_draws, seed=self.seed
        )
        for table in tables:
            print(render(table))
            print("\n".join(verdict(table, "scIMF", metric.name) for metric in table.metrics) + "\n")
        if self.out is not None:
            self.out.write_text(json.dumps([to_json_dict(table) for table in tables], indent=1) + "\n")
            print(f"numbers written to {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Tell what a preset, a run, a settings file or a data file holds; without an argument, list the presets.

    Attributes:
        what: name of a preset, folder of a run, .json, .h5ad or .zarr.
    """

    what: Annotated[str, tyro.conf.Positional] = ""

    def run(self) -> None:
        print(_shown(self.what))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a user's mistake ends with its message and status 2, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"demo": Demo, "train": Train, "predict": Predict, "evaluate": Evaluate, "show": Show}
    if arguments[:1] == ["--version"]:
        print(f"scjax {__version__}")
        return
    try:
        if arguments[:1] == ["train"]:
            command = _parse_train(arguments[1:])
        else:
            command = tyro.extras.subcommand_cli_from_dict(
                {name: cls for name, cls in commands.items()}, prog="scjax", description=__doc__, args=arguments
            )
        command.run()
    except (ValueError, ArithmeticError, OSError) as err:
        notes = "".join(f"\n{note}" for note in getattr(err, "__notes__", ()))
        print(f"scjax: {err}{notes}", file=sys.stderr)
        raise SystemExit(2) from err


def _parse_train(arguments: list[str]) -> Train:
    """The settings decide the defaults of the options, so they are read first."""
    from scjax import presets

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = first.add_mutually_exclusive_group()
    group.add_argument("--preset")
    group.add_argument("--config", type=Path)
    first.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen, rest = first.parse_known_args(arguments)
    asks_help = "-h" in rest or "--help" in rest
    if chosen.preset is None and chosen.config is None and not asks_help:
        raise ValueError(
            f"train needs --preset NAME or --config FILE.json. The presets: {', '.join(presets.names())}. "
            "`scjax show NAME` prints one, `scjax train --help` the options."
        )
    experiment = (
        read_experiment(chosen.config) if chosen.config else presets.preset(chosen.preset or "scimf/klein").experiment
    )
    for assignment in chosen.set:
        if "=" not in assignment:
            raise ValueError(f"--set takes KEY=VALUE, such as model.n_heads=1; got {assignment!r}.")
    # All at once: the fields of another kind of split are only whole together.
    experiment = override(experiment, dict(a.split("=", 1) for a in chosen.set))
    text = (
        f"{Train.__doc__.splitlines()[0]}\n\n--preset NAME  one of {', '.join(presets.names())}\n"
        "--config FILE  a JSON file of settings (`scjax show NAME` prints one)\n"
        "--set KEY=VALUE  any setting, also another kind of split:\n"
        "    --set split.kind=HoldOutTimes --set 'split.times=[2, 4]'"
    )
    return tyro.cli(
        Train,
        prog="scjax train",
        description=text,
        args=rest,
        default=Train(data=tyro.MISSING, out=tyro.MISSING, experiment=experiment),
    )


def _shown(what: str) -> str:
    from scjax import presets

    if not what:
        lines = [f"{name:<20} {presets.preset(name).summary}" for name in presets.names()]
        return "\n".join(["presets:", *lines, "`scjax show NAME` tells the rest."])
    if what in presets.names():
        found = presets.preset(what)
        told = [f"{f.name}: {getattr(found, f.name)}" for f in dataclasses.fields(found) if f.name != "experiment"]
        return "\n".join([what, *told, to_json(found.experiment)])
    path = Path(what)
    if not path.exists():
        raise ValueError(f"{what} is neither a file or folder nor a preset. The presets: {', '.join(presets.names())}.")
    if path.suffix in (".h5ad", ".zarr"):
        return _shown_data(path)
    if path.suffix == ".json":
        return to_json(read_experiment(path))
    return _shown_run(path)


def _shown_data(path: Path) -> str:
    from scjax.data.source import read_anndata

    adata = read_anndata(path)
    lines = [f"{path}: {adata.n_obs} cells x {adata.n_vars} genes"]
    for column in adata.obs:
        values = adata.obs[column]
        counts = values.value_counts().sort_index()
        shown = ", ".join(f"{v} ({n})" for v, n in counts.items()) if len(counts) <= 20 else f"{len(counts)} values"
        lines.append(f"  obs {column}: {shown}")
    for kind in ("layers", "obsm", "uns"):
        keys = [str(k) for k in getattr(adata, kind) if k is not None]
        if keys:
            lines.append(f"  {kind}: {', '.join(keys)}")
    return "\n".join(lines)


def _shown_run(path: Path) -> str:
    from scjax import checkpoint

    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    about = checkpoint.read_about(folder)
    lines = [f"{path}: {about['kind']}, run {about['run']}"]
    lines.append(f"  checkpoints: steps {', '.join(map(str, checkpoint.list_steps(folder)))}")
    lines.append(f"  data: {about['data']['n_cells']} cells, digest {about['data']['digest']}")
    lines.append(f"  trained on times {about['split']['train']}, held out {about['split']['held_out']}")
    lines.append(f"  genes: {len(about['transform']['feature_names'])}")
    lines.append(f"  made with: {about['provenance']['versions']}")
    return "\n".join([*lines, json.dumps(about["experiment"], indent=2)])


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"out {out} exists already and is not overwritten; choose another name.")
