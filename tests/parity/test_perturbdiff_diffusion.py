"""Schedules, diffusion algebra and losses of PerturbDiff against the recorded numbers of the PyTorch reference.

Every array of a recording is read by its test, which says so at its end. Tolerances are those of the recordings'
README, or float32's own where it gives none.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import cases, load, or_absent, require

from scjax.kernels import embedding_inner_product, negative_distance
from scjax.losses import energy_distance, mmd, mmd2
from scjax.processes.diffusion import diffuse, make_schedule, marginal, noise_from_x0, posterior, x0_from_noise

KINDS = ("diffusion_", "losses_", "schedules_")
CASES = cases("perturbdiff", KINDS)
EPS = np.finfo(np.float32).eps


def each(kind):
    return pytest.mark.parametrize("case", or_absent("perturbdiff", kind, CASES[kind]))


@pytest.fixture(autouse=True)
def _at_hand():
    require("perturbdiff")


class Golden:
    """A recording that remembers what was read of it."""

    def __init__(self, case):
        self.arrays = load("perturbdiff", case)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return self.arrays[name]

    def array(self, name):
        """As what our functions take: integers as int32."""
        value = self[name]
        return jnp.asarray(value.astype(np.int32) if value.dtype == np.int64 else value)

    def all_was_read(self):
        assert self.read == set(self.arrays), set(self.arrays) - self.read


def close(actual, reference, tolerance, what=""):
    """The tolerance counts from the largest entry."""
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    np.testing.assert_allclose(actual, reference, atol=tolerance * np.abs(reference).max(), rtol=0, err_msg=what)


@each("schedules_")
def test_schedules(case):
    golden = Golden(case)
    for name in {key.split("/")[0] for key in golden.arrays}:
        kind, n_times, power = re.fullmatch(r"([a-z_]+)_(\d+)(?:_g([\d.]+))?", name).groups()
        schedule = make_schedule(kind, int(n_times), **({"power": float(power)} if power else {}))
        for key in golden.arrays:
            if key.startswith(f"{name}/"):
                close(getattr(schedule, key.removeprefix(f"{name}/")), golden[key], 1e-12, key)
    golden.all_was_read()


@each("diffusion_")
def test_diffusion(case):
    golden = Golden(case)
    schedule = make_schedule(str(golden["schedule"]), int(golden["steps"]))
    t, x0, noise = golden.array("t"), golden.array("x_start"), golden.array("noise")
    x_t = diffuse(schedule, x0, t, noise)
    close(x_t, golden["x_t"], 4 * EPS)
    close(x_t, golden["x_t_f64noise"], 4 * EPS)

    law = posterior(schedule, x0, golden.array("x_t"), t)
    close(law.mean, golden["posterior_mean"], 4 * EPS)
    close(law.variance, golden["posterior_variance"], 4 * EPS)
    close(law.log_variance, golden["posterior_log_variance_clipped"], 4 * EPS)
    law = marginal(schedule, x0, t)
    close(law.mean, golden["q_mean"], 4 * EPS)
    close(law.variance, golden["q_variance"], 4 * EPS)
    np.testing.assert_allclose(law.log_variance, golden["q_log_variance"], rtol=4 * EPS)

    # Rounding of x_t, magnified by what divides it: little noise at first, little signal at last.
    x_t, rounding = golden.array("x_t"), 8 * EPS * np.abs(golden["x_t"]).max()
    table = lambda name: getattr(schedule, name)[golden["t"]][:, None, None]  # noqa: E731
    error = np.abs(noise_from_x0(schedule, x0, x_t, t) - golden["eps_from_xstart"])
    assert (error <= rounding / table("sqrt_one_minus_alphas_cumprod")).all()
    error = np.abs(x0_from_noise(schedule, noise, x_t, t) - golden["xstart_from_eps"])
    assert (error <= rounding * table("sqrt_recip_alphas_cumprod")).all()
    # The x_0 that the reference finds for a posterior mean has this mean.
    found = posterior(schedule, golden.array("xstart_from_xprev"), x_t, t).mean
    close(found, golden["posterior_mean"], 8 * EPS)
    golden.all_was_read()


def half_squared_mmd(kernel, x, y):
    """By inner products of embeddings."""
    product = partial(embedding_inner_product, kernel)
    return (product(x, x) + product(y, y)) / 2 - product(x, y)


def floored_laplacian(a, b, *, blur):
    """exp(-|a - b| / blur), with the reference's floor of 1e-4 under the exponent."""
    return jnp.exp(-jnp.maximum(-negative_distance(a, b) / blur, 1e-4))


LOSSES = {
    "energy": lambda x, y, blur: energy_distance(x, y),
    "gaussian": lambda x, y, blur: mmd2(x, y, blur[None], unbiased=False) / 2,
    "laplacian": lambda x, y, blur: half_squared_mmd(partial(floored_laplacian, blur=blur), x, y),
}


@partial(jax.jit, static_argnames=("kind", "few"))
def values_and_grad(kind, target, output, blur, few):
    """Of each set, and the gradient of their mean."""
    del few  # a program for each way to find distances
    of_sets = lambda output: jax.vmap(lambda x, y: LOSSES[kind](x, y, blur))(target, output)  # noqa: E731
    values, pull_back = jax.vjp(of_sets, output)
    return values, pull_back(jnp.full_like(values, 1 / len(values)))[0]


def coinciding(x, y):
    """How many pairs of each set's two populations coincide."""
    return np.array([(np.abs(a[:, None] - b[None]).sum(-1) == 0).sum() for a, b in zip(x, y, strict=True)])


@each("losses_")
@pytest.mark.parametrize("few", [2**18, 0], ids=["by differences", "by products"])
def test_losses(case, few, monkeypatch):
    monkeypatch.setattr(mmd, "_FEW", few)
    golden = Golden(case)
    target, output = golden.array("target"), golden.array("output")
    n_cells = target.shape[1]
    close(jnp.mean((target - output) ** 2, (1, 2)), golden["mse_per_set"], 1e-5)

    names = [key.removesuffix("_grad_f64") for key in golden.arrays if key.endswith("_grad_f64")]
    assert "energy" in names
    for name in names:
        kind, _, blur = name.partition("_blur")
        blur = float(blur or 1)
        values, grad = values_and_grad(kind, target, output, jnp.float32(blur), few)
        # README: 5e-4, and 4e-3 for a Laplacian so narrow that round-off is large beside it. The float32 values of the
        # reference are off by as much.
        tolerance = 4e-3 if (kind, blur) == ("laplacian", 0.05) else 5e-4
        close(values, golden[f"{name}_f64"], tolerance, name)
        close(values, golden[name], 2 * tolerance, name)
        # A kernel so narrow that no two cells see each other has for gradient what float32 makes of one pair.
        rounding = 4 * EPS * float(jnp.max(jnp.abs(target))) / (blur**2 * n_cells**2 * len(values))
        for suffix in ("grad_f64", "grad_of_mean_wrt_output"):
            recorded = golden[f"{name}_{suffix}"]
            limit = 1e-3 * np.abs(recorded).max() + rounding
            np.testing.assert_allclose(grad, recorded, atol=limit, rtol=0, err_msg=f"{name}_{suffix}")

    # The energy distance closer than that: as its terms give it, and with the 1e-4 that the reference adds to the
    # distance of every pair of cells that coincide.
    values, _ = values_and_grad("energy", target, output, jnp.float32(1), few)
    terms, x, y = golden["energy_terms_f64"], golden["target"], golden["output"]
    rounding = 4 * EPS * terms.max()
    np.testing.assert_allclose(values, terms @ [1, -0.5, -0.5], atol=rounding)
    added = 1e-4 * (coinciding(x, y) - coinciding(x, x) / 2 - coinciding(y, y) / 2) / n_cells**2
    np.testing.assert_allclose(values + added, golden["energy_f64"], atol=rounding)
    # Two cells of one set and three of another.
    close(energy_distance(target[0, :2], output[1, :3]), golden["energy_unbatched_2x3"], 5e-4)
    golden.all_was_read()
