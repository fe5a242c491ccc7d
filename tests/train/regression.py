"""A small regression with noise in its loss, for the tests of training; run as a program, one process of its life.

python regression.py DIRECTORY N_STEPS [--resume] [--terminate-at STEP]
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from scjax.checkpoint import CheckpointWriter, list_steps, read
from scjax.train.hooks import JsonlLogger, SaveCheckpoints
from scjax.train.loop import fit
from scjax.train.optimizers import OptimizerConfig, make_optimizer
from scjax.train.state import TrainState, state_form

CONFIG = OptimizerConfig(learning_rate=1e-2, decay_every=4, decay_factor=0.8, n_warmup=3)
KEY = jax.random.key(1)


def loss(params, batch, key):
    """Mean squared error under dropout of the inputs: another key, another number."""
    kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    error = jnp.tanh((batch["x"] * kept) @ params["w"]) @ params["v"] - batch["y"]
    terms = {"mse": jnp.mean(error**2), "decay": jnp.sum(params["v"] ** 2)}
    return terms["mse"] + 1e-3 * terms["decay"], terms


def batch_at(n: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng([0, n]).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x)}


def params() -> dict[str, jax.Array]:
    w, v = np.random.default_rng(5).normal(size=(2, 3, 4)).astype(np.float32)
    return {"w": jnp.asarray(w), "v": jnp.asarray(v.T)}


def run(n_steps: int, **options) -> TrainState:
    """`fit` on this problem, in calls of 5 steps, with a moving average."""
    options = {"scan_steps": 5, "ema_decay": 0.9, "key": KEY, **options}
    return fit(loss, params(), make_optimizer(CONFIG, 20), options.pop("batches", batch_at), n_steps=n_steps, **options)


def template(best: bool = False) -> TrainState:
    return state_form(params(), make_optimizer(CONFIG, 20), KEY, ema=True, best=best)


def bits(tree) -> list[bytes]:
    """Every leaf's bytes: equal only where the bits are."""
    leaves = jax.tree.leaves(jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("n_steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--terminate-at", type=int)
    args = parser.parse_args()

    def batches(n: int) -> dict[str, np.ndarray]:
        if n == args.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(n)

    step, state = None, None
    if args.resume:
        step, arrays, _ = read(args.directory, like={"state": template()})
        state = arrays["state"]
    with CheckpointWriter(args.directory, about={"run": "regression"}, resume_from=step) as writer:
        hooks = [JsonlLogger(args.directory / "metrics.jsonl"), SaveCheckpoints(writer)]
        run(args.n_steps, batches=batches, hooks=hooks, state=state, log_every=2)
    sys.stdout.write(f"{list_steps(args.directory)}\n")


if __name__ == "__main__":
    main()
