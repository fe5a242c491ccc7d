"""One small training on several devices and processes, as programs; each writes what became of it to a folder.

python shared_run.py devices FOLDER                 on 8 devices of one process
python shared_run.py processes FOLDER PORT NUMBER   on 2 devices of each of two processes, after the former
python shared_run.py killed FOLDER PORT NUMBER      likewise, and the second is killed in step 11
"""

import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from scjax import hosts
from scjax.checkpoint import CheckpointWriter, list_steps, read
from scjax.mesh import make_mesh, template
from scjax.train.hooks import Hook, JsonlLogger, Progress, SaveCheckpoints
from scjax.train.loop import Interrupted, fit
from scjax.train.optimizers import OptimizerConfig, make_optimizer
from scjax.train.state import TrainState, state_form

N_STEPS, HALF = 20, 10
ABOVE = 16  # entries: the two matrices, and not the vector
TX = make_optimizer(OptimizerConfig(learning_rate=1e-2, decay_every=4, decay_factor=0.8, n_warmup=3), N_STEPS)


def key() -> jax.Array:
    return jax.random.key(1)  # not at import: processes are joined before anything is computed


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(5)
    shapes = {"w": (6, 16), "v": (16, 6), "odd": (3, 7), "b": (6,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def loss(params, batch, key):
    """A mean over rows under dropout, and a comparison of every row with every other."""
    kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    made = jnp.tanh((batch["x"] * kept) @ params["w"]) @ params["v"] + params["b"][None]
    gram = lambda rows: jnp.mean(jnp.exp(-jnp.mean((rows[:, None] - rows[None]) ** 2, axis=-1)))  # noqa: E731
    terms = {"mse": jnp.mean((made - batch["y"]) ** 2), "spread": (gram(made) - gram(batch["y"])) ** 2}
    return terms["mse"] + terms["spread"] + 1e-3 * jnp.sum(params["odd"] ** 2), terms


def batch_at(n: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng([0, n]).normal(size=(16, 6)).astype(np.float32)
    return {"x": x, "y": np.sin(x)}


def validate(params) -> dict[str, jax.Array]:
    return {"loss": _score(params)}


@jax.jit
def _score(params):
    return jnp.sum(params["w"] ** 2) + jnp.mean(params["odd"])


def run(n_steps: int = N_STEPS, *, batches=batch_at, **options) -> TrainState:
    options = {"scan_steps": 5, "ema_decay": 0.9, "key": key(), "log_every": 2, **options}
    return fit(loss, params(), TX, batches, n_steps=n_steps, validate=validate, validate_every=5, **options)


def saved(folder: Path, n_steps: int = HALF, *, resume: int | None = None, hooks=(), **options) -> TrainState:
    """`run` that saves every 5 steps; `resume`: from this step of the folder, laid out as the options say."""
    state = None
    if resume is not None:
        like = state_form(params(), TX, key(), ema=True, best=True)
        if options.get("mesh") is not None:
            like = template(like, options["mesh"], options.get("shard_above"))
        state = read(folder, resume, like={"state": like}).arrays["state"]
    with CheckpointWriter(folder, about={"run": "shared"}, resume_from=resume) as writer:
        hooks = [*hooks, JsonlLogger(folder / "metrics.jsonl"), SaveCheckpoints(writer)]
        return run(n_steps, state=state, hooks=hooks, checkpoint_every=5, **options)


def write(file: Path, state: TrainState) -> None:
    """Every leaf as one whole array, in the order of the tree; by the first process."""
    from jax.experimental.multihost_utils import process_allgather

    def whole(leaf):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        local = leaf.is_fully_addressable or leaf.is_fully_replicated
        return np.asarray(leaf if local else process_allgather(leaf, tiled=True))

    leaves = [whole(leaf) for leaf in jax.tree.leaves(state)]
    if hosts.is_first():
        np.savez(file, *leaves)


def parts(state: TrainState) -> dict[str, list[int]]:
    """The shape of what one device holds."""
    return {name: list(leaf.addressable_shards[0].data.shape) for name, leaf in state.params.items()} | {
        f"adam {name}": list(leaf.addressable_shards[0].data.shape) for name, leaf in _moments(state).items()
    }


def _moments(state: TrainState):
    return next(part.mu for part in state.opt_state if hasattr(part, "mu"))


class Told(Hook):
    """Counts what one process hears."""

    def __init__(self):
        self.told = 0

    def on_log(self, step, metrics):
        self.told += 1


def on_devices(folder: Path) -> dict:
    assert jax.device_count() == 8
    all_8, half = make_mesh(cells=2), make_mesh(4)
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("scjax.train.loop").propagate = False
    logging.getLogger("scjax.train.loop").addHandler(handler)

    write(folder / "one.npz", run())
    write(folder / "replicated.npz", run(mesh=all_8))
    traced = []

    def counted(*args):
        traced.append(1)
        return loss(*args)

    options = {"scan_steps": 5, "key": key(), "mesh": all_8, "shard_above": ABOVE}
    fit(counted, params(), TX, batch_at, n_steps=7, **options)
    n_short = len(traced)
    fit(counted, params(), TX, batch_at, n_steps=20, **options)
    spread = saved(folder / "whole", N_STEPS, mesh=all_8, shard_above=ABOVE)
    write(folder / "spread.npz", spread)
    for name in ("to_8", "to_4", "to_one", "to_two"):
        saved(folder / name, mesh=all_8, shard_above=ABOVE)
    saved(folder / "from_one")
    again = {"mesh": all_8, "shard_above": ABOVE}
    write(folder / "8_to_8.npz", saved(folder / "to_8", N_STEPS, resume=HALF, **again))
    write(folder / "8_to_4.npz", saved(folder / "to_4", N_STEPS, resume=HALF, mesh=half, shard_above=ABOVE))
    write(folder / "8_to_1.npz", saved(folder / "to_one", N_STEPS, resume=HALF))
    write(folder / "1_to_8.npz", saved(folder / "from_one", N_STEPS, resume=HALF, **again))
    try:
        run(mesh=all_8, batches=lambda n: jax.tree.map(lambda leaf: leaf[:15], batch_at(n)))
    except ValueError as err:
        refused = str(err)
    return {
        "parts": parts(spread),
        "warnings": sorted(set(warnings)),
        "traced": [n_short, len(traced)],
        "refused": refused,
    }


def on_processes(folder: Path, number: int) -> dict:
    assert (jax.process_count(), jax.local_device_count()) == (2, 2)
    mesh = make_mesh()
    shared = {"mesh": mesh, "shard_above": ABOVE}
    first = hosts.is_first()
    told = {"first": first}

    write(folder / "processes.npz", run(mesh=mesh))
    hook = Told()
    log = (folder / f"progress-{number}.txt").open("w")
    spread = saved(folder / "two", hooks=[hook, Progress(file=log, force=True)], **shared)
    log.close()
    told |= {"parts": parts(spread), "told": hook.told}
    write(folder / "2_to_2.npz", saved(folder / "two", N_STEPS, resume=HALF, **shared))
    write(folder / "8_to_2.npz", saved(folder / "to_two", N_STEPS, resume=HALF, **shared))

    def broken(n):
        if n == 7 and not first:
            raise OSError("the file vanished")
        return batch_at(n)

    def ended(n):
        if n == 7 and not first:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(n)

    def other_run():
        with CheckpointWriter(folder / "two", about={"run": "other"}):
            pass

    def no_mesh():
        run()

    class Full(Hook):
        def on_log(self, step, metrics):
            if step == 6:
                raise OSError("the disk is full")

    class Strict(Hook):
        def on_wait(self, step, seconds):
            if step == 5:
                raise RuntimeError("too slow")

    class FullAtTheEnd(Hook):
        """The last checkpoint cannot be written, which shows in the background; the log is smaller."""

        def on_log(self, step, metrics):
            if step == HALF:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

    def last_write_fails():
        try:
            saved(folder / "last", HALF, hooks=[FullAtTheEnd()], **shared)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    wrong = {
        "broken": lambda: saved(folder / "broken", N_STEPS, batches=broken, **shared),
        "full": lambda: saved(folder / "full", N_STEPS, hooks=[Full()], **shared),
        "sigterm": lambda: saved(folder / "sigterm", N_STEPS, batches=ended, **shared),
        "strict": lambda: saved(folder / "strict", N_STEPS, hooks=[Strict()], **shared),
        "last": last_write_fails,
        "other run": other_run,
        "no mesh": no_mesh,
        "disagree": lambda: hosts.check_agreed("the settings", f"n_steps={number}"),
        "too few": lambda: make_mesh(2),
    }
    for name, work in wrong.items():
        try:
            work()
        except (Exception, Interrupted) as err:  # noqa: BLE001 the test looks at them
            told[name] = f"{type(err).__name__}: {err}"
    hosts.check_agreed("what is the same", "one")
    told["steps"] = {name: list_steps(folder / name) for name in ("two", "broken", "full", "strict", "last", "sigterm")}
    return told


def killed(folder: Path, number: int) -> None:
    def batches(n):
        if n == 11 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch_at(n)

    saved(folder / "killed", N_STEPS, batches=batches, mesh=make_mesh(), shard_above=ABOVE)


def main() -> None:
    what, folder, *more = sys.argv[1:]
    folder = Path(folder)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if what == "devices":
        found, file = on_devices(folder), folder / "devices.json"
    else:
        port, number = more
        assert hosts.start(f"localhost:{port}", 2, int(number))
        if what == "killed":
            killed(folder, int(number))
            return
        found, file = on_processes(folder, int(number)), folder / f"process-{number}.json"
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
