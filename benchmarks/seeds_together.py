"""What does it save to train seeds together in one compiled program?

    python benchmarks/seeds_together.py --model scimf
    python benchmarks/seeds_together.py --model perturbdiff

The preset of the demo (scimf/klein, perturbdiff/mcfaline) with its own batches, update and sizes. Sides: a program of
one run, and a program of several seeds (`jax.vmap`); times are seconds a step and seed, so that their ratio is what
training together saves. Compiling is timed apart: together it is done once, separate runs do it once each.
"""

import argparse
from functools import partial

import harness
from jobs import sides

PRESETS = {"scimf": "scimf/klein", "perturbdiff": "perturbdiff/mcfaline"}
N_PER_CALL = {"scimf": 10, "perturbdiff": 4}


def job(model: str, n_seeds: int, together: bool) -> harness.Job:
    """Steps of one seed, or of all of them."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from scjax.data import datasets
    from scjax.experiment import cellsets, timeseries
    from scjax.presets import preset
    from scjax.train.ensemble import make_group_update
    from scjax.train.optimizers import make_optimizer
    from scjax.train.state import init_state
    from scjax.train.step import make_scanned_update

    kind, adata = {
        "scimf": (timeseries, datasets.klein2015),
        "perturbdiff": (cellsets, datasets.mcfaline2023),
    }[model]
    adata, experiment = adata(), preset(PRESETS[model]).experiment
    tasks = [kind.prepare(replace(experiment, seed=seed), adata) for seed in range(n_seeds if together else 1)]
    tx = make_optimizer(experiment.optimizer, experiment.n_steps)
    states = []
    for seed in range(len(tasks)):
        key_init, key = jax.random.split(jax.random.key(seed))
        params = jax.jit(tasks[0].model.init)(key_init)
        states.append(init_state(params, tx, key, ema=experiment.ema_decay is not None))
    n, stack = N_PER_CALL[model], lambda *leaves: np.stack(leaves)
    chunks = [jax.tree.map(stack, *(task.batches(step) for step in range(n))) for task in tasks]
    make = make_group_update if together else make_scanned_update
    update = jax.jit(make(tasks[0].model.loss, tx, experiment.ema_decay, **tasks[0].average), donate_argnums=0)
    settings = {"preset": PRESETS[model], "n_seeds": len(tasks)}
    if not together:
        return sides.jax_training(update, states[0], jax.tree.map(jnp.asarray, chunks[0]), n, settings=settings)
    chunk = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *chunks)
    state, running = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jnp.ones(len(tasks), bool)
    compiled, compile_s = sides.compiled(update, state, chunk, jnp.int32(0), jnp.int32(n), running)
    done = 0

    def call() -> None:
        nonlocal state, done
        state, metrics = jax.block_until_ready(compiled(state, chunk, jnp.int32(done), jnp.int32(n), running))
        done += n
        if not bool(metrics["finite"].all()):
            raise RuntimeError(f"the loss is not finite; what was timed is no training: {metrics}")

    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return harness.Job(call, n * len(tasks), settings=settings, compile_s=compile_s, temp_bytes=temp_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="scimf")
    parser.add_argument("--seeds", type=int, default=3)
    harness.add_options(parser, n_rounds=7, peer=False)
    args = parser.parse_args()
    if args.worker:
        harness.serve(partial(job, args.model, args.seeds, args.worker == "together"), args.threads)
        return
    harness.ask(
        args,
        [__file__, "--model", args.model, "--seeds", str(args.seeds)],
        ["together", "one"],
        {"question": "seeds_together", "model": args.model, "shapes": {"n_seeds": args.seeds}},
        f"\n{PRESETS[args.model]}: a step and seed, {args.seeds} seeds together and one run",
    )


if __name__ == "__main__":
    main()
