"""Numbers that are not finite: the run stops, says where, and no checkpoint holds one."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import victim
from victim import bits, log

from scjax.checkpoint import CheckpointWriter, list_steps, read
from scjax.train.hooks import SaveCheckpoints
from scjax.train.loop import NonFiniteError, fit


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_odd_number_in_a_batch(uninterrupted, tmp_path, value):
    """3e38 is finite and its square is not. Once the batch is mended the run goes on as if nothing had been."""
    folder = tmp_path / "run"

    def batches(n):
        batch = victim.batch_at(n)
        if n == 9:
            batch["y"][3, 1] = value
        return batch

    with pytest.raises(NonFiniteError, match=f"mse is (nan|inf) after 9 good steps.*step 9 in {folder}/checkpoints"):
        victim.run(folder, batches=batches)
    assert (folder / "failed.json").exists()
    assert list_steps(folder / "checkpoints")[-1] == 9
    victim.run(folder, resume=True)
    assert not (folder / "failed.json").exists()
    assert bits(folder) == bits(uninterrupted)
    assert log(folder) == log(uninterrupted)


def trained(tmp_path, loss, tx, params):
    """24 steps with a checkpoint after each; batch 9 has a zero where others have a one."""
    with CheckpointWriter(tmp_path, about={"run": "a"}) as writer:
        fit(
            loss, params, tx, lambda n: np.float32(n != 9), key=victim.jax.random.key(0), n_steps=24, scan_steps=1,
            hooks=[SaveCheckpoints(writer)], checkpoint_every=1,
        )  # fmt: skip


def test_nan_in_the_gradient_alone(tmp_path):
    """The derivative of sqrt(v^2 + c) at v = 0 is 0 for c = 1, and 0 / 0 for c = 0, where the loss is 0."""

    def loss(params, batch, key):
        return jnp.sqrt(params["v"] ** 2 + batch), {}

    with pytest.raises(NonFiniteError, match="grad_norm is nan after 9 good steps.* checkpoint: step 9 in") as caught:
        trained(tmp_path, loss, optax.sgd(0.1), {"v": jnp.zeros(())})
    assert caught.value.metrics["loss"] == 0
    assert float(read(tmp_path).arrays["state"]["params"]["v"]) == 0


def test_a_step_too_large_is_not_saved(tmp_path):
    """Loss and gradient of the step are finite, the parameters after it are not: that is no last good state."""

    def loss(params, batch, key):
        return params["v"] * jnp.where(batch == 0, -1e10, 0.0), {}

    message = r"parameters after step 10 are not finite.*The last good checkpoint: step 9 in"
    with pytest.raises(NonFiniteError, match=message) as caught:
        trained(tmp_path, loss, optax.sgd(1e30), {"v": jnp.zeros(())})
    assert (caught.value.step, caught.value.term, caught.value.saved.step) == (10, "parameters", 9)
    assert list_steps(tmp_path)[-1] == 9
    assert np.isfinite(read(tmp_path).arrays["state"]["params"]["v"])
