"""What accelerators ask of compiled programs: no word with the host, shapes that are known, one compilation.

The training update and the sampler of every model are lowered for TPUs, which needs none.
"""

import functools
import re
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_table import MODELS

from scjax.train.optimizers import OptimizerConfig, make_optimizer
from scjax.train.state import init_state
from scjax.train.step import make_scanned_update

STEPS = 2  # of a call

# Words of StableHLO that speak with the host while the program runs, and of shapes that only show then.
HOST = re.compile(r"\w*callback\w*|stablehlo\.(?:infeed|outfeed|send|recv)\b")
DYNAMIC = re.compile(
    r"tensor<(?:\d+x)*\?[^>]*>|stablehlo\.(?:dynamic_(?:reshape|iota|pad|gather|conv|broadcast_in_dim)"
    r"|real_dynamic_slice|[gs]et_dimension_size)\b"
)


def scimf_sampling(row, config, n):
    x0 = row.batch_at(config, n).x0
    return functools.partial(row.module.simulate, ts=(0.0, 1.0, 2.5), config=config), (x0,)


def scdfm_sampling(row, config, n, **settings):
    batch = row.batch_at(config, n)
    perturbation = np.repeat(batch.perturbation[:1], len(batch.source[0]), axis=0)
    sample = functools.partial(row.module.sample, config=config, n_steps=3, **settings)
    return sample, (batch.source[0], perturbation, batch.genes)


def perturbdiff_sampling(row, config, n, **settings):
    batch = row.batch_at(config, n)

    def sample(params, control, covariates, mask, space, measured, key, constants):
        return row.module.sample(
            params, control, covariates, key, mask=mask, space=space, measured=measured,
            constants=constants, config=config, n_steps=3, **settings,
        )  # fmt: skip

    return sample, (batch.control, batch.covariates, batch.mask, batch.space, batch.measured)


# A row of the models' table, and what is changed of its config: one layer says as much as two.
UPDATES = {
    "scimf": ("scimf", {}),
    "scimf-converged": ("scimf", {"sinkhorn": "converged"}),
    "scdfm": ("scdfm", {"n_layers": 1}),
    "perturbdiff": ("perturbdiff", {"n_layers": 1}),
}
SAMPLERS = {
    "scimf": (*UPDATES["scimf"], scimf_sampling),
    "scdfm": (*UPDATES["scdfm"], scdfm_sampling),
    "scdfm-adaptive": (*UPDATES["scdfm"], functools.partial(scdfm_sampling, solver="tsit5", trajectory=True)),
    "perturbdiff": (*UPDATES["perturbdiff"], perturbdiff_sampling),
    "perturbdiff-ddpm": (*UPDATES["perturbdiff"], functools.partial(perturbdiff_sampling, sampler="ddpm")),
}
PROGRAMS = [("update", name) for name in UPDATES] + [("sampler", name) for name in SAMPLERS]
SYSTEMS = [(kind, name) for kind, name in PROGRAMS if name in ("scimf", "scdfm", "perturbdiff")]


class Program:
    """A jitted function, and its arguments at call n."""

    def __init__(self, kind, name):
        of, change, *sampler = (UPDATES if kind == "update" else SAMPLERS)[name]
        self.row = row = MODELS[of]
        self.config = replace(row.config, **change)
        self.constants = row.constants(self.config)
        self.params = jax.jit(lambda key: row.module.init(key, self.config))(jax.random.key(1))
        if kind == "update":
            tx = make_optimizer(OptimizerConfig(), n_steps=100)
            self.state = init_state(self.params, tx, jax.random.key(2), ema=True)
            loss = functools.partial(row.module.loss, config=self.config, **self.constants)
            self.jitted = jax.jit(make_scanned_update(loss, tx, 0.9))
            self.args_at = self.chunk_at
        else:
            (self.sampler,) = sampler
            sample = self.sampler(row, self.config, 0)[0]
            self.jitted = jax.jit(lambda params, key, args: sample(params, *args, key=key, **self.constants))
            self.args_at = self.population_at

    def chunk_at(self, n):
        batches = [self.row.batch_at(self.config, STEPS * n + i) for i in range(STEPS)]
        chunk = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        return self.state, chunk, np.int32(STEPS * n), np.int32(STEPS)

    def population_at(self, n):
        return self.params, jax.random.key(n), self.sampler(self.row, self.config, n)[1]

    def call(self, args):
        out = jax.block_until_ready(self.jitted(*args))
        if hasattr(self, "state"):
            self.state, out = out
        return out


program_of = functools.cache(Program)  # traced once for the whole module


def primitives(jaxpr):
    """The names of all operations, those of inner functions, too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def host_calls(traced):
    return sorted({name for name in primitives(traced.jaxpr.jaxpr) if "callback" in name or "feed" in name})


@contextmanager
def compilations():
    """The seconds that each compilation takes, in a list that grows meanwhile."""
    found = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("kind", "name"), PROGRAMS)
def test_programs_for_tpus_need_no_host_and_know_their_shapes(kind, name, monkeypatch):
    program = program_of(kind, name)
    args = program.args_at(0)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # some code asks for it, as of attention
    traced = program.jitted.trace(*args)
    assert not host_calls(traced)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in text  # it is the program, and not a stub of it
    assert not HOST.findall(text)
    assert not DYNAMIC.findall(text)


@pytest.mark.parametrize(("kind", "name"), SYSTEMS)
def test_one_compilation_serves_all_batches(kind, name):
    program = program_of(kind, name)
    calls = [program.args_at(n) for n in range(3)]
    with compilations() as found:
        outs = []
        for n, args in enumerate(calls):
            if kind == "update":
                args = (program.state, *args[1:])
            outs.append(jax.tree.map(np.asarray, program.call(args)))
            assert len(found) == 1, f"{len(found)} compilations after call {n}"
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, outs[:2]), strict=True)]
    assert not all(same)  # batches and keys did differ


def test_the_search_finds_what_it_looks_for():
    """A callback, and a shape without a number."""

    def asks(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    traced = jax.jit(lambda x: jax.lax.cond(x[0] > 0, asks, jnp.cos, x)).trace(jnp.ones(3))
    assert host_calls(traced) == ["pure_callback"]
    assert HOST.findall(traced.lower().as_text())

    def reaches_out(x):
        return jnp.concatenate([x, x]).reshape(2, -1)

    (n,) = jax.export.symbolic_shape("n")
    exported = jax.export.export(jax.jit(reaches_out), platforms=["tpu"])(jax.ShapeDtypeStruct((n,), jnp.float32))
    assert DYNAMIC.findall(exported.mlir_module())


@pytest.mark.parametrize("name", ["scdfm", "perturbdiff"])
def test_more_layers_are_no_more_draws(name):
    """Of the first parameters, in the compiled program: a draw compiles for longer than it runs."""

    def n_draws(n_layers):
        row = MODELS[name]
        init = functools.partial(row.module.init, config=replace(row.config, n_layers=n_layers))
        return str(jax.make_jaxpr(init)(jax.random.key(0))).count("random_bits")

    assert n_draws(6) == n_draws(3) > 0
