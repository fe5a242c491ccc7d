"""What do populations cost in scIMF that are too large for all pairs of cells, and how good is the approximation?

    python benchmarks/large_population.py simulate            # 100,000 cells x 50 dims over one time unit
    python benchmarks/large_population.py landmarks           # error over the number of landmarks
    python benchmarks/large_population.py sinkhorn            # 50,000 x 5,000 cells

The model is trained first, on the shipped Klein series: 50 components, the default network, 200 steps. `simulate` and
`sinkhorn` work on cells drawn from that series with noise of a third of each component's standard deviation; every
side runs in a process of its own, whose high-water mark is told, and more than `--limit` GiB is a failure. `landmarks`
evaluates the drift at the 1000 cells of the series itself and at 5000 drawn ones; its errors are root mean squares
over cells, relative to the root mean square of the part of the drift that comes from the others. It also tells the
error of as many senders drawn at random, the simplest approximation of the same cost.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

from scjax.data.datasets import klein2015
from scjax.experiment import train
from scjax.losses import annealed_sinkhorn_divergence, self_transport
from scjax.models import scimf
from scjax.predict import load, project
from scjax.presets import preset

GIB = 2**30
N_DIMS, DT, TS = 50, 0.1, (0.0, 1.0)
N_DRAWN = 5000  # cells of the second row of `landmarks`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("simulate", "landmarks", "sinkhorn"))
    parser.add_argument("--cells", type=int, help="100,000 by default, 5000 for sinkhorn")
    parser.add_argument("--targets", type=int, default=50_000, help="cells of the second population of sinkhorn")
    parser.add_argument(
        "--self-transport",
        action="store_true",
        help="of the targets, too: once a series in training, ten times the work",
    )
    parser.add_argument("--landmarks", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--limit", type=float, default=4, help="GiB; more is a failure")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        WORKERS[args.question](args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or Path(folder)
        trained_on_klein(args.folder, args.steps)
        found = ASKED[args.question](args)
    record = {"question": f"large populations: {args.question}", "model": "scimf", "training_steps": args.steps} | found
    if args.save:
        harness.append(harness.environment() | record, harness.RESULTS / f"large_population_{args.question}.json")
    peaks = [side["peak_rss_bytes"] for side in found["sides"].values() if "peak_rss_bytes" in side]
    if max(peaks, default=0) > args.limit * GIB:
        raise SystemExit(f"more than {args.limit:g} GiB")


# -- the model and its cells


def trained_on_klein(folder: Path, n_steps: int) -> None:
    """A run on the Klein series in 50 components, and the projected cells beside it; kept if it is there."""
    if (folder / "cells.npy").exists():
        return
    small = preset("scimf/klein").experiment
    experiment = replace(
        small,
        model=replace(small.model, n_dims=N_DIMS, intrinsic_widths=(256, 256)),
        preprocess=replace(small.preprocess, n_components=N_DIMS),
        optimizer=replace(small.optimizer, learning_rate=2e-3),
        n_steps=n_steps,
        checkpoint_every=n_steps,
    )
    adata = klein2015()
    train(experiment, adata, folder / "run")
    np.save(folder / "cells.npy", project(load(folder / "run"), adata))


def model_of(folder: Path) -> tuple[scimf.Config, scimf.Params, np.ndarray]:
    trained = load(folder / "run")
    return replace(trained.config, dt=DT), trained.params, np.load(folder / "cells.npy")


def drawn(cells: np.ndarray, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(n, cells.shape[1])) * cells.std(axis=0) / 3
    return (cells[rng.integers(len(cells), size=n)] + noise).astype(np.float32)


def side(args: argparse.Namespace, worker: str) -> dict:
    """A worker's figures; its results lie in the folder."""
    command = [sys.executable, __file__, args.question, "--worker", worker, "--folder", str(args.folder)]
    command += ["--cells", str(args.cells), "--targets", str(args.targets)]
    command += ["--self-transport"] if args.self_transport else []
    subprocess.run(command, check=True)
    found = dict(np.load(args.folder / f"{worker}.npz"))
    found["figures"] = {name: float(value) for name, value in found.items() if value.ndim == 0}
    print(worker, " ".join(f"{name} {value:.4g}" for name, value in found["figures"].items()), flush=True)
    return found


def timed(f, *args):
    """(result, seconds of compiling, seconds of running once)."""
    started = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    compiled_at = time.perf_counter()
    result = jax.block_until_ready(compiled(*args))
    return result, compiled_at - started, time.perf_counter() - compiled_at


# -- simulate


def ask_simulate(args: argparse.Namespace) -> dict:
    args.cells = args.cells or 100_000
    exact = side(args, "exact")
    sides = {"exact": exact["figures"]}
    moved = np.sqrt(np.mean((exact["x"][1] - exact["x"][0]) ** 2))
    for n in args.landmarks:
        near = side(args, f"landmarks {n}")
        error = np.sqrt(np.mean((near["x"][1] - exact["x"][1]) ** 2))
        energy = np.mean(near["energy"]) / np.mean(exact["energy"]) - 1
        sides[f"landmarks {n}"] = near["figures"] | {"error": float(error / moved), "energy_error": float(energy)}
        print(f"  end of the paths off by {error / moved:.2%} of the displacement, energy by {energy:+.3%}")
    shapes = {"cells": args.cells, "dims": N_DIMS, "solver_steps": round((TS[1] - TS[0]) / DT)}
    return {"shapes": shapes, "sides": sides}


def run_simulate(args: argparse.Namespace) -> None:
    config, params, cells = model_of(args.folder)
    x0 = drawn(cells, args.cells)
    if args.worker != "exact":
        config = replace(config, attention="landmarks", n_landmarks=int(args.worker.split()[1]))
    before = harness.peak_bytes()
    f = partial(scimf.simulate, ts=TS, config=config)
    path, compile_s, wall_s = timed(lambda params, x0, key: f(params, x0, key=key), params, x0, jax.random.key(0))
    np.savez(
        args.folder / f"{args.worker}.npz",
        x=path.x,
        energy=path.kinetic_energy[-1],
        wall_s=wall_s,
        compile_s=compile_s,
        peak_rss_bytes=harness.peak_bytes(),
        rss_before_bytes=before,
    )


# -- landmarks


def ask_landmarks(args: argparse.Namespace) -> dict:
    config, params, cells = model_of(args.folder)
    sides = {}
    for name, x in {"klein": cells.astype(np.float32), "drawn": drawn(cells, N_DRAWN)}.items():
        of = lambda x, config: np.asarray(jax.jit(partial(scimf.drift, config=config))(params, x))  # noqa: E731
        exact, alone = of(x, config), of(x, replace(config, n_blocks=0))
        scale = rms(exact - alone)
        rows = {"interaction_share": scale / rms(exact), "cells": len(x)}
        for n in args.landmarks:
            if n >= len(x):
                continue
            near = of(x, replace(config, attention="landmarks", n_landmarks=n))
            random = np.mean([rms(hearing(params, x, n, s, config) - exact) for s in range(3)])
            rows[str(n)] = {"landmarks": rms(near - exact) / scale, "random_senders": float(random) / scale}
            print(f"{name}, {n} of {len(x)}: {rows[str(n)]}", flush=True)
        sides[name] = rows
    return {"shapes": {"dims": N_DIMS}, "sides": sides}


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def hearing(params, x, n: int, seed: int, config: scimf.Config) -> np.ndarray:
    """The drift where every cell hears the same n random cells alone: each receiver beside them, one population."""
    senders = x[np.random.default_rng(seed).choice(len(x), n, replace=False)]

    @jax.jit
    def one(cell):
        # A group of the others: the receiver goes first and does not hear itself.
        return scimf.drift(params, jnp.concatenate([cell[None], senders]), config=config)[0]

    return np.asarray(jax.lax.map(one, jnp.asarray(x), batch_size=16))


# -- sinkhorn


def ask_sinkhorn(args: argparse.Namespace) -> dict:
    args.cells = args.cells or 5000
    found = side(args, "sinkhorn")
    return {
        "shapes": {"cells": args.cells, "targets": args.targets, "dims": N_DIMS},
        "sides": {"scjax": found["figures"]},
    }


def run_sinkhorn(args: argparse.Namespace) -> None:
    config, _, cells = model_of(args.folder)
    blurring = {"blur": config.blur, "scaling": config.scaling}
    both = drawn(cells, args.targets + args.cells)
    target, x = both[: args.targets], both[args.targets :] * 0.9
    before = harness.peak_bytes()
    figures, own = {}, jnp.zeros(())
    if args.self_transport:
        own, compile_s, wall_s = timed(partial(self_transport, **blurring), target)
        figures = {"self_transport_s": wall_s, "self_transport_compile_s": compile_s}

    def divergence(x, target, own):
        return annealed_sinkhorn_divergence(target, x, self_transport_x=own, **blurring)

    (value, grad), compile_s, wall_s = timed(jax.value_and_grad(divergence), x, target, own)
    figures |= {"grad_norm": jnp.linalg.norm(grad), "wall_s": wall_s, "compile_s": compile_s}
    figures |= {"peak_rss_bytes": harness.peak_bytes(), "rss_before_bytes": before}
    figures |= {"matrix_bytes": 4 * args.targets * args.cells}
    # Without what the targets cost among themselves the value is no divergence.
    figures |= {"divergence": value} if args.self_transport else {"divergence_and_own_cost_of_targets": value}
    np.savez(args.folder / "sinkhorn.npz", **figures)


ASKED = {"simulate": ask_simulate, "landmarks": ask_landmarks, "sinkhorn": ask_sinkhorn}
WORKERS = {"simulate": run_simulate, "sinkhorn": run_sinkhorn}

if __name__ == "__main__":
    main()
