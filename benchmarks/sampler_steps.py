"""How many steps does PerturbDiff's sampler need, which sampler, and over which times?

    python benchmarks/sampler_steps.py
    python benchmarks/sampler_steps.py --shared-noise 0.2 --n-train 6000

Trains a small model on `synthetic.VaryingMixtures`, whose sets of cells differ from each other by what nobody observes
(the share of cells that respond, and a shift). Then generates sets with each number of steps, by DDIM and DDPM, over
all times ("respaced") and over the first times alone ("truncated", as the published sampler does).

A good sampler gives the right cells: the energy distance of the cells of all sets together, in expression units, is
near that of true sets. And it gives sets that differ as true ones do: the spread of set means, of their shifts and of
the shares of responding cells is told as a multiple of what the world's formulas give, 1 being right. Whoever predicts
the mean population again and again has the first right and the others wrong (the row "mean population": each cell from
any set).
"""

import argparse
import time
from functools import partial

import harness
import numpy as np

from scjax.batches import CellSetBatch
from scjax.data.synthetic import VaryingMixtures

STEPS = (10, 20, 50, 100, 1000)
SETS_PER_BATCH = 16
WORLD = VaryingMixtures(n_genes=3)
FEW = 4096  # cells of an energy distance: all pairs are held
COLUMNS = ("energy", "set means", "shifts", "shares", "mean share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-train", type=int, default=5000, help="training steps")
    parser.add_argument("--n-sets", type=int, default=256, help="that each sampler generates")
    parser.add_argument("--n-cells", type=int, default=32, help="of a set")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of the samplers")
    parser.add_argument(
        "--shared-noise", type=float, default=0.0, help="correlation of the noise of two cells of a set"
    )
    parser.add_argument("--energy-weight", type=float, default=0.0, help="of the loss; above 0 it draws sets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()

    world = WORLD
    started = time.perf_counter()
    model, params = train(world, args)
    train_s = time.perf_counter() - started
    truth, other = (draw(world, args.seed, 10**6 + i, args.n_sets, args.n_cells) for i in range(2))
    order = np.random.default_rng(args.seed).permutation(args.n_sets * args.n_cells)
    mixed = other.cells.reshape(-1, world.n_genes)[order].reshape(other.cells.shape)
    rows = []

    def show(name: str, sets: np.ndarray, **settings) -> None:
        rows.append({"name": name, **settings, **quality(world, sets, truth.cells)})
        seconds = f"{settings['seconds']:.1f}" if "seconds" in settings else "-"
        print(f"| {name} | {' | '.join(f'{rows[-1][column]:.3f}' for column in COLUMNS)} | {seconds} |", flush=True)

    print(f"\ntrained in {train_s:.0f} s; the share of responding cells is {world.weight_moments()[0]:.3f} on average")
    print(f"| sampler, times, steps | {' | '.join(COLUMNS)} | seconds |\n|{'---|' * (len(COLUMNS) + 2)}")
    show("true sets", other.cells)
    show("mean population", mixed)
    for n_steps in args.steps:
        for sampler in ("ddim", "ddpm"):
            for spacing in ("respaced", "truncated"):
                if n_steps == model.config.n_times and spacing == "truncated":
                    continue  # the whole chain either way
                settings = {"n_steps": n_steps, "sampler": sampler, "spacing": spacing}
                sets, seconds = generate(model, params, truth, args, **settings)
                show(f"{sampler} {spacing} {n_steps}", sets, **settings, seconds=seconds)
    if args.save:
        record = {"question": "sampler_steps", "model": "perturbdiff", "world": repr(world), "settings": vars(args)}
        record |= {"train_s": train_s, "rows": rows}
        harness.append(harness.environment() | record, harness.RESULTS / "sampler_steps.json")


def draw(world: VaryingMixtures, seed: int, n: int, n_sets: int, n_cells: int) -> CellSetBatch:
    """Batch n: sets that no other batch has."""
    sets = world.simulate(seed=seed * 10**7 + n, n_sets=n_sets, n_cells=n_cells)
    return CellSetBatch(
        cells=sets.x.astype(np.float32),
        control=sets.control.astype(np.float32),
        covariates={"perturbation": np.ones(n_sets, np.int32)},
        mask=np.ones((n_sets, n_cells), bool),
    )


def train(world: VaryingMixtures, args: argparse.Namespace):
    """A small model after `--n-train` steps on fresh sets, and the moving average of its parameters."""
    import jax

    from scjax.models import perturbdiff
    from scjax.train.hooks import Progress
    from scjax.train.loop import fit
    from scjax.train.optimizers import OptimizerConfig, make_optimizer

    config = perturbdiff.Config(
        n_genes=world.n_genes,
        n_perturbations=2,
        cell_type="none",
        batch="none",
        d_covariate=8,
        covariate_width="model",
        d_model=32,
        n_layers=2,
        n_heads=2,
        energy_weight=args.energy_weight,
        shared_noise=args.shared_noise,
        condition_dropout=0.0,
        divisor=1.0,
    )
    model = perturbdiff.build(config, perturbdiff.Constants())
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="cosine", n_warmup=args.n_train // 20, clip_norm=1.0)
    state = fit(
        model.loss,
        model.init(jax.random.key(args.seed)),
        make_optimizer(optimizer, n_steps=args.n_train),
        lambda step: draw(world, args.seed, step, SETS_PER_BATCH, args.n_cells),
        key=jax.random.key(args.seed + 1),
        n_steps=args.n_train,
        scan_steps=20,
        ema_decay=0.99,
        hooks=[Progress(force=True)],
    )
    return model, state.ema


def generate(model, params, batch: CellSetBatch, args: argparse.Namespace, **settings) -> tuple[np.ndarray, float]:
    """Sets for the controls of `batch`, and the seconds that they took, compilation apart."""
    import jax

    run = jax.jit(partial(model.predict, guidance=1.0, **settings))
    inputs = params, batch.control, batch.covariates, jax.random.key(args.seed + 2)
    run = run.lower(*inputs).compile()
    started = time.perf_counter()
    sets = np.asarray(run(*inputs))
    return sets, time.perf_counter() - started


def quality(world: VaryingMixtures, sets: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The columns of the table. Spreads are standard deviations over sets, by those of the world's formulas."""
    import jax

    from scjax.losses import energy_distance

    n_cells = sets.shape[1]
    every = [x.reshape(-1, world.n_genes)[:: max(1, x.shape[0] * n_cells // FEW)][:FEW] for x in (sets, truth)]
    mean, variance = world.weight_moments()
    share, shift = world.weight(sets), world.shift(sets)
    of_means = np.trace(np.cov(sets.mean(axis=1), rowvar=False)) / np.trace(world.set_mean_covariance(n_cells))
    of_shifts = shift.var(ddof=1) / (world.shift_std**2 + world.std**2 / n_cells)
    of_shares = share.var(ddof=1) / (variance + (mean - mean**2 - variance) / n_cells)
    return {
        "energy": float(jax.jit(energy_distance)(*every)),
        "set means": float(np.sqrt(of_means)),
        "shifts": float(np.sqrt(of_shifts)),
        "shares": float(np.sqrt(of_shares)),
        "mean share": float(share.mean()),
    }


if __name__ == "__main__":
    main()
