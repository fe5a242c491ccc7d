"""A run of a small regression in a real run folder, to be killed; run as a program, one process of its life.

python victim.py FOLDER [--resume] [--every N] [--die-at EVENT] [--stall-at STEP] [--file-size BYTES --full-at STEP]
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from scjax.checkpoint import read
from scjax.data.leaks import Findings
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import TimeSeriesSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutTimes, split_times
from scjax.experiment import TimeSeriesExperiment, read_experiment
from scjax.experiment.run import Run, Task, admit, check_same_settings, train_task
from scjax.models.scimf import Config
from scjax.train.hooks import Hook
from scjax.train.optimizers import OptimizerConfig
from scjax.types import Model

ROOT = Path(__file__).parents[2]
N_STEPS = 24
EXPERIMENT = TimeSeriesExperiment(
    model=Config(n_dims=3, n_heads=1),
    spec=DataSpec(space="latent", time="day"),
    split=HoldOutTimes(times=(1.0,)),
    preprocess=Preprocess(n_components=None),
    sampling=TimeSeriesSampling(n_cells=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, n_warmup=3),
    n_steps=N_STEPS,
    scan_steps=1,
    ema_decay=0.9,
    log_every=1,
    checkpoint_every=1,
)
DIGEST = "of no data"


def loss(params, batch, key):
    """Mean squared error under dropout of the inputs: another key, another number."""
    kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    error = jnp.tanh((batch["x"] * kept) @ params["w"]) - batch["y"]
    return jnp.mean(error**2), {"mse": jnp.mean(error**2)}


def init(key):
    return {"w": jax.random.normal(key, (3, 3)), "unused": jax.random.normal(key, (64, 64))}  # 16 KiB on the disk


def batch_at(n: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng([0, n]).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x)}


def prepare(batches=batch_at):
    """What `train_task` asks for: a task of any model."""

    def of(experiment, adata, store=None) -> Task:
        split = split_times(experiment.split, (0.0, 1.0, 2.0))
        return Task(
            model=Model(experiment.model, init, loss, lambda *args: None),
            data=SimpleNamespace(split=split),
            split=split,
            batches=batches,
            arrays={"transform": {"mean": np.arange(3.0)}},
            about={"kind": "scimf", "transform": {"feature_names": ["a", "b", "c"]}},
            findings=Findings((), ()),
        )

    return of


def run(folder: Path, *, resume: bool = False, batches=batch_at, hooks=(), **settings) -> Run:
    """As `experiment.train`, without data."""
    experiment = replace(EXPERIMENT, **settings)
    admit(folder, resume, None)
    if resume:
        check_same_settings(read_experiment(folder), experiment, folder)
    adata = SimpleNamespace(n_obs=0)
    return train_task(experiment, adata, folder, DIGEST, prepare(batches), resume=resume, step=None, hooks=hooks)


def process(*args: object) -> subprocess.Popen:
    """A run of this file as a program."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(running: subprocess.Popen) -> tuple[int, str]:
    """Status and stderr; a process that hangs is a failure."""
    try:
        _, told = running.communicate(timeout=180)
    finally:
        running.kill()
    return running.returncode, told


def bits(folder: Path) -> list[bytes]:
    """Of all arrays of the newest checkpoint."""
    leaves = jax.tree.leaves(read(folder / "checkpoints").arrays)
    raw = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves)
    return [np.asarray(leaf).tobytes() for leaf in raw]


def log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0, "waited": 0} for line in lines]


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Begun(Hook):
    """Tells the killer that the first step is about to run."""

    def on_compiled(self, seconds):
        tell("begun")


_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.scandir", "shutil.rmtree")


def die_at(event: int, folder: Path) -> None:
    """Kill -9 of this process just before its n-th dealing with the files of the run, in whatever thread."""
    count = 0

    def hook(name, args):
        nonlocal count
        if (
            name in _EVENTS
            and args
            and str(folder) in os.fsdecode(args[0] if isinstance(args[0], bytes) else str(args[0]))
        ):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--stall-at", type=int)
    parser.add_argument("--file-size", type=int, default=resource.RLIM_INFINITY)
    parser.add_argument("--full-at", type=int)
    args = parser.parse_args()

    def limit() -> None:
        """No file may grow beyond this: for whoever writes, as if the disk were full."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_size, resource.RLIM_INFINITY))

    def batches(n: int) -> dict[str, np.ndarray]:
        if n == args.full_at:
            limit()
        if n == args.stall_at:
            tell("stalled")
            time.sleep(600)
        return batch_at(n)

    if args.full_at is None:
        limit()
    if args.die_at is not None:
        die_at(args.die_at, args.folder)
    run(args.folder, resume=args.resume, batches=batches, hooks=[Begun()], checkpoint_every=args.every)


if __name__ == "__main__":
    main()
