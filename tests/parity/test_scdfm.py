"""scDFM against the recorded numbers of the PyTorch reference; each kind of file has its test.

Tolerances are those of the recordings' README. Data and metrics have files of their own beside this one.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import cases, load, or_absent, require, under

from scjax.batches import PairedBatch
from scjax.convert.scdfm import Reader, config_from_torch, params_from_torch
from scjax.kernels import median_bandwidths
from scjax.losses import mmd2
from scjax.models import scdfm
from scjax.nn.time import sinusoids
from scjax.processes.flow import ERK38, endpoint, integrate, poisson_rates, straight_path
from scjax.train.optimizers import OptimizerConfig, learning_rate, make_optimizer

ELSEWHERE = ("coexpression_mask", "split_additive", "pipeline_", "metrics_cell_eval")  # of data, of metrics
KINDS = (
    "cosine_schedule",
    "diff_attention_",
    "diff_block",
    "diff_perceiver_block",
    "expression_decoder",
    "flow_path",
    "gene_adaln",
    "gene_encoder",
    "inverse_search",
    "masked_cross_attention_layer",
    "mmd",
    "perceiver_block",
    "perturbation_embedder_drug",
    "poisson_noise",
    "rk4_sample",
    "rk4_solver_only",
    "runsh_",
    "time_embedder",
    "train_step_",
    "value_encoder",
    "velocity_",
)
CASES = cases("scdfm", KINDS + ELSEWHERE)
BLOCK = {"atol": 3e-6, "rtol": 1e-5}


def each(kind):
    return pytest.mark.parametrize("case", or_absent("scdfm", kind, CASES[kind]))


@pytest.fixture(autouse=True)
def _at_hand():
    require("scdfm")


def test_every_file_is_of_a_known_kind():
    assert not CASES["unknown"], f"no test reads {CASES['unknown']}"
    assert any(CASES.values()), "the folder of recordings is empty"


class Golden:
    """A recording: its settings, inputs, outputs and weights."""

    def __init__(self, case):
        self.arrays = load("scdfm", case)
        self.meta = json.loads(str(self.arrays["meta_json"]))

    def __getitem__(self, name):
        """An array, as what our functions take: integers as int32."""
        value = self.arrays[name]
        return jnp.asarray(value.astype(np.int32) if value.dtype == np.int64 else value)

    @property
    def state(self):
        return under(self.arrays, "w/")

    def config(self, **settings):
        """Of a part of the network, where the file holds only its weights."""
        known = {"d_model": self.meta["d_model"], "n_heads": self.meta.get("num_heads", 8), "n_layers": 1}
        return scdfm.Config(**{**known, **settings})

    def reader(self, at="part"):
        """Reads the weights of a part as if it stood at this place in the network."""
        return Reader({f"{at}.{name}": w for name, w in self.state.items()}, self.meta["d_model"])

    def model(self, state=None, **settings):
        """Config, parameters and constants of a whole network."""
        state = self.state if state is None else state
        kind = "gene" if self.meta.get("perturbation_function", "crisper") == "crisper" else "table"
        config = config_from_torch(state, perturbation=kind, n_heads=self.meta.get("num_heads", 8), **settings)
        for ours, theirs in (("d_model", "d_model"), ("n_layers", "nlayers"), ("n_tokens", "ntoken")):
            assert getattr(config, ours) == self.meta.get(theirs, getattr(config, ours)), ours
        assert config.fusion == self.meta.get("fusion_method", config.fusion)
        params = jax.tree.map(jnp.asarray, params_from_torch(state, config))
        return config, params, scdfm.Constants(neighbours_of(self.arrays["in/mask"]))


def neighbours_of(mask):
    """The table of a boolean mask in which True means: may not attend."""
    rows = [np.flatnonzero(~row) for row in mask]
    widest = max(map(len, rows))
    return jnp.asarray(np.stack([np.pad(r, (0, widest - len(r)), constant_values=-1) for r in rows]).astype(np.int32))


def close(actual, reference, what="", *, atol=3e-6, rtol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(reference), atol=atol, rtol=rtol, err_msg=what)


def run(module, params, *args, method=None):
    """The module on each cell of a batch."""
    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(jax.vmap(lambda *a: module.apply({"params": params}, *a, method=method)))(*args)


@each("diff_attention_")
def test_differential_attention(case):
    golden = Golden(case)
    keys_from = "stream" if golden.meta["cross"] else "control"
    module = scdfm.DifferentialAttention(golden.config(), golden.meta["depth"], keys_from)
    params = golden.reader().differential_attention("part", golden.meta["num_heads"])
    whole = lambda m, y, u: m(y, m.of_control(u))  # noqa: E731
    close(run(module, params, golden["in/noisy_y"], golden["in/x"], method=whole), golden["out/y"])


@each("diff_block")
def test_differential_block(case):
    golden = Golden(case)
    keys_from = "stream" if "cross" in case else "control"
    module = scdfm.DifferentialBlock(golden.config(), golden.meta["depth"], keys_from)
    params = golden.reader().differential("part", golden.meta["num_heads"])
    whole = lambda m, y, u, c: m(y, m.of_control(u), c)  # noqa: E731
    close(run(module, params, golden["in/y"], golden["in/x"], golden["in/c"], method=whole), golden["out/y"])


@each("diff_perceiver_block")
def test_differential_perceiver_block(case):
    golden = Golden(case)
    heads, depth, config = golden.meta["num_heads"], golden.meta["depth"], golden.config()
    reader = golden.reader()
    whole = lambda m, y, u, c: m(y, m.of_control(u), c)  # noqa: E731
    y = golden["in/y"]
    first = scdfm.DifferentialBlock(config, depth, "stream")
    y = run(first, reader.differential("part.diff_self_attn", heads), y, y, golden["in/c"], method=whole)
    second = scdfm.DifferentialBlock(config, depth, "control")
    params = reader.differential("part.diff_cross_attn", heads)
    close(run(second, params, y, golden["in/x"], golden["in/c"], method=whole), golden["out/y"])
    assert not reader.left
    assert not reader.misfits


@each("perceiver_block")
def test_perceiver_block(case):
    golden = Golden(case)
    module = scdfm.PerceiverBlock(golden.config(fusion="perceiver"))
    whole = lambda m, y, u, c: m(y, m.of_control(u), c, None)  # noqa: E731
    params = golden.reader().perceiver("part")
    close(run(module, params, golden["in/y"], golden["in/x"], golden["in/c"], method=whole), golden["out/y"])


@each("expression_decoder")
def test_velocity_head(case):
    golden = Golden(case)
    reader, d = golden.reader(), golden.meta["d_model"]
    params = {
        "joined": reader.linear("part.fc.0", n_in=2 * d),
        "hidden": reader.linear("part.fc.2"),
        "output": reader.linear("part.fc.4", n_out=1),
    }
    x = golden["in/x"]
    module = scdfm.VelocityHead(golden.config())
    # In the network the second half of every gene's features is the perturbation, the same for all genes.
    whole = lambda m, gene, p: m(gene[None], m.of_perturbation(p))[0]  # noqa: E731
    found = run(module, params, x[..., :d].reshape(-1, d), x[..., d:].reshape(-1, d), method=whole)
    close(found.reshape(x.shape[:2]), golden["out/pred"])


@each("gene_adaln")
def test_gene_modulation(case):
    golden = Golden(case)
    config, reader = golden.config(), golden.reader()
    modulation = reader.linear("part.adaLN_modulation.1", n_out=3 * config.d_model)
    params = {"gene_modulation": modulation, "gene_norm": reader.norm("part.norm")}
    whole = lambda m, g, x: m.modulated(x, m.of_genes(g))  # noqa: E731
    found = run(scdfm.Layer(config, 0), params, golden["in/gene_emb"], golden["in/value_emb"], method=whole)
    close(found, golden["out/y"])


@each("masked_cross_attention_layer")
@pytest.mark.parametrize("dense", [1, 1000])
def test_graph_layer(case, dense, monkeypatch):
    """Over gathered neighbours, and under a mask."""
    monkeypatch.setattr(scdfm, "_DENSE", dense)
    golden = Golden(case)
    module = scdfm.GraphLayer(golden.config(graph_heads=golden.meta["num_heads"]))
    params, neighbours = golden.reader().graph_layer("part"), neighbours_of(golden.arrays["in/mask"])
    found = run(module, params, golden["in/tgt"], golden["in/memory"], method=lambda m, x, y: m(x, y, neighbours, None))
    close(found, golden["out/y"])


@each("gene_encoder")
def test_gene_encoder(case):
    golden = Golden(case)
    at = "encoder"
    config = golden.config(n_tokens=golden.meta["ntoken"], graph_heads=golden.meta["num_heads"], graph_rows="first")
    reader, d = golden.reader(at), config.d_model
    tokens = {
        "embedding": reader.take(f"{at}.embedding.weight", (config.n_tokens, d)),
        "norm": reader.norm(f"{at}.enc_norm"),
        "layer": reader.graph_layer(f"{at}.perturbation_interaction"),
    }
    params = {"tokens": jax.tree.map(jnp.asarray, tokens)}
    constants = scdfm.Constants(neighbours_of(golden.arrays["in/mask"]))
    genes, perturbation = golden["in/gene_ids"], golden["in/pert_ids"]
    assert np.array_equal(golden.arrays["out/mask_rows"], golden.arrays["in/mask"][golden.arrays["in/gene_ids"][0]])
    rows = constants.graph[genes[0]]
    encode = lambda ids: scdfm.GeneEncoder(config).apply(  # noqa: E731
        {"params": params["tokens"]}, ids, rows, golden.meta["mask_num"], None
    )
    close(jnp.stack([encode(ids) for ids in genes]), golden["out/gene_emb"], "gene tokens")
    if np.all(golden.arrays["in/gene_ids"] == golden.arrays["in/gene_ids"][:1]):
        close(scdfm.gene_tokens(params, genes[0], constants=constants, config=config), golden["out/gene_emb"][0])
    embed = lambda ids: scdfm.perturbation_embedding(params, ids, constants=constants, config=config)  # noqa: E731
    close(embed(perturbation), golden["out/pert_emb"], "perturbation embedding")
    close(golden["out/pert_tokens"].mean(axis=1), golden["out/pert_emb"], "mean over slots")


@each("perturbation_embedder_drug")
def test_perturbation_table(case):
    golden = Golden(case)
    n, d = golden.state["embedding.weight"].shape
    config = golden.config(n_tokens=1, perturbation="table", n_perturbations=n)
    reader = golden.reader()
    table = {"embedding": reader.take("part.embedding.weight", (n, d)), "norm": reader.norm("part.enc_norm")}
    params = {"perturbations": jax.tree.map(jnp.asarray, table)}
    constants = scdfm.Constants(jnp.zeros((1, 1), jnp.int32))
    ids = golden["in/ids"]
    close(scdfm.perturbation_embedding(params, ids, constants=constants, config=config), golden["out/mean"])
    one = scdfm.embed_vectors(params, params["perturbations"]["embedding"][ids.ravel()], config=config)
    close(one.reshape(golden["out/per_token"].shape), golden["out/per_token"])


@each("value_encoder")
def test_value_encoder(case):
    golden = Golden(case)
    params = golden.reader().value_encoder("part")
    found = run(scdfm.ValueEncoder(golden.config()), params, golden["in/x"], method=lambda m, x: m(x, None))
    close(found, golden["out/emb"])


@each("time_embedder")
def test_time_embedding(case):
    golden = Golden(case)
    reader = golden.reader()
    params = {"mlp": {"Dense_0": reader.linear("part.mlp.0", n_in=256), "Dense_1": reader.linear("part.mlp.2")}}
    close(sinusoids(golden["in/t"], golden.meta["freq_size"], float(golden.meta["max_period"])), golden["out/sinusoid"])
    params = jax.tree.map(jnp.asarray, params)
    close(scdfm.TimeEmbedding(golden.config()).apply({"params": params}, golden["in/t"]), golden["out/emb"])


def velocity(golden, config, params, constants, t, genes=None):
    genes = golden["in/gene_ids"][0] if genes is None else genes
    inputs = golden["in/x_t"], t, golden["in/source"], golden["in/pert_ids"], genes
    return jax.jit(lambda *a: scdfm.velocity(*a, constants=constants, config=config))(params, *inputs)


HEAD = {"objective": "perturbation", "head_input": "leaking", "graph_rows": "first"}


@each("velocity_")
def test_velocity(case):
    golden = Golden(case)
    config, params, constants = golden.model(**HEAD)
    close(velocity(golden, config, params, constants, golden["in/t"]), golden["out/velocity"], "velocity")
    same = jnp.full_like(golden["in/t"], golden.meta["scalar_t"])
    close(velocity(golden, config, params, constants, same), golden["out/velocity_scalar_t"], "velocity at one time")
    close_head(golden, config, params, constants, **BLOCK)
    masked = jnp.broadcast_to(params["mask"][None], golden["out/pert_emb_masked"].shape)
    close(masked, golden["out/pert_emb_masked"], "mask embedding")


def close_head(golden, config, params, constants, t=None, **tolerance):
    genes, perturbation = golden["in/gene_ids"][0], golden["in/pert_ids"]
    embedding = scdfm.perturbation_embedding(params, perturbation, constants=constants, config=config)
    close(embedding, golden["out/pert_emb"], "perturbation embedding", **tolerance)
    guess = scdfm.predict_perturbation(
        params, golden["in/x_t"], golden["in/source"], genes, perturbation=perturbation, t=t,
        constants=constants, config=config,
    )  # fmt: skip
    close(guess, golden["out/pred_p"], "perturbation head", **tolerance)


def drawn_weights(golden):
    """The weights of a wide network by the recipe of the README, checked against their recorded sums."""
    state = {}
    for name, shape, sums in zip(
        golden.arrays["recipe/names"], golden.arrays["recipe/shapes"], golden.arrays["recipe/sum_and_abssum"],
        strict=True,
    ):  # fmt: skip
        shape = tuple(int(n) for n in str(shape).split(","))
        seed = zlib.crc32(f"{golden.meta['recipe_seed']}:{name}".encode())
        if name.endswith("embedding.weight") or name == "p_mask_embed":
            offset, scale = 0.0, 1.0
        elif ".lambda_" in name:
            offset, scale = 0.0, 0.3
        elif len(shape) == 1:
            offset, scale = (1.0, 0.1) if name.endswith("weight") else (0.0, 0.05)
        else:
            offset, scale = 0.0, np.sqrt(2 / sum(shape))
        draw = np.random.RandomState(seed).standard_normal(shape)
        state[str(name)] = (offset + scale * draw).astype(np.float32)
        wide = state[str(name)].astype(np.float64)
        np.testing.assert_allclose([wide.sum(), np.abs(wide).sum()], sums, rtol=1e-9, atol=1e-9)
    return state


@each("runsh_")
def test_published_sizes(case):
    golden = Golden(case)
    state = drawn_weights(golden)
    assert sum(w.size for w in state.values()) == golden.meta["n_params"]
    assert len(state) == golden.meta["n_tensors"]
    config, params, constants = golden.model(state, gamma=golden.meta["gamma"], **HEAD)
    wide = {"atol": 1e-5, "rtol": 1e-5}
    close(velocity(golden, config, params, constants, golden["in/t"]), golden["out/velocity"], "velocity", **wide)
    close_head(golden, config, params, constants, t=golden["in/t"], **wide)
    g = scdfm.gene_tokens(params, golden["in/gene_ids"][0], constants=constants, config=config)
    close(g[None], golden["out/gene_emb"], "gene tokens", **wide)

    config, params, constants = golden.model(state, gamma=golden.meta["gamma"], graph_rows="first")
    batch = PairedBatch(
        source=golden["in/source"][None],
        target=golden["in/x1"][None],
        perturbation=golden["in/pert_ids"][:1],
        genes=golden["in/gene_ids"][0],
    )
    assert np.all(golden.arrays["in/pert_ids"] == golden.arrays["in/pert_ids"][:1])
    (total, terms), grads = jax.jit(
        jax.value_and_grad(lambda p: scdfm.loss_at(
            p, batch, golden["in/x0"][None], golden["in/t"][None], constants=constants, config=config
        ), has_aux=True)
    )(params)  # fmt: skip
    x_t, u_t = straight_path(golden["in/x0"], golden["in/x1"], golden["in/t"])
    close(x_t, golden["loss/x_t"])
    close(u_t, golden["loss/dx_t"])
    close(median_bandwidths(golden["in/x1"]), golden["loss/sigmas"])
    close(terms["flow"], golden["loss/mse"], atol=0)
    close(terms["mmd2"], golden["loss/mmd2"], atol=2e-6)
    close(total, golden["loss/total"], atol=0)
    tensors = {name: g for name, g in under(golden.arrays, "grad/").items() if name not in ("names", "norms")}
    names, norms = golden.arrays["grad/names"], golden.arrays["grad/norms"]
    # All four lambda vectors share one scalar gradient, a sum that cancels. Recorded in float32 alone, it is off by
    # 1.6e-4 from the same network in float64.
    close_gradients(state, config, grads, names, norms, tensors, lambda_rtol=3e-4)


UNKNOWN = 1e300  # in the place of a number that was not recorded


def placed(state, config, entries):
    """A tensor of each state-dict name, in the places of our parameters."""
    return params_from_torch({name: entries(name, w) for name, w in state.items()}, config)


def norms_by_name(state, config, tree):
    """The l2 norm over each tensor of the state dict; -1 for those that our parameters have no place for."""
    numbers = {name: i for i, name in enumerate(state)}
    labels = placed(state, config, lambda name, w: np.full(w.shape, numbers[name]))
    squares, used = np.zeros(len(state)), np.zeros(len(state), bool)
    for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
        np.add.at(squares, label.ravel(), np.square(np.asarray(leaf, np.float64)).ravel())
        used[np.unique(label)] = True
    return {name: np.sqrt(squares[i]) if used[i] else -1.0 for name, i in numbers.items()}


def close_named(state, config, tree, reference, what, tolerance):
    """The recorded tensors of some names against ours; `tolerance(name, tensor)` is absolute."""
    nowhere = placed(state, config, lambda name, w: reference.get(name, np.full(w.shape, UNKNOWN)).astype(np.float64))
    limits = placed(
        state,
        config,
        lambda name, w: np.full(w.shape, tolerance(name, reference[name]) if name in reference else 0.0),
    )
    n_compared = 0
    for want, limit, leaf in zip(*map(jax.tree.leaves, (nowhere, limits, tree)), strict=True):
        known = want != UNKNOWN
        n_compared += known.sum()
        assert np.all(np.abs(np.asarray(leaf, np.float64) - want)[known] <= limit[known]), what
    assert n_compared == sum(w.size for w in reference.values()), f"{what}: some recorded tensors were not compared"


def close_gradients(state, config, grads, names, norms, tensors, lambda_rtol=1e-4):
    """Norms of all gradients, and some gradients whole, by the README's rules."""
    found = norms_by_name(state, config, grads)

    def rtol(name):
        return lambda_rtol if ".lambda_" in name else 1e-4

    for name, norm in zip(map(str, names), norms, strict=True):
        if norm == -1:
            assert found[name] in (-1.0, 0.0), f"{name} has a gradient"
        elif not name.endswith("in_proj_bias"):
            np.testing.assert_allclose(found[name], norm, rtol=rtol(name), atol=1e-9, err_msg=name)
    close_named(state, config, grads, tensors, "gradients", lambda name, g: rtol(name) * np.abs(g).max())


@each("train_step_")
def test_training_step(case):
    """Loss, gradients and a few Adam steps with every recorded draw; dropout is off."""
    golden = Golden(case)
    meta, genes = golden.meta, golden["in/gene_ids"]
    leaking = meta["mode"] == "predict_p"
    config, params, constants = golden.model(
        dropout=0.0,
        gamma=meta["gamma"] if meta["use_mmd"] else 0.0,
        start=meta["noise_type"].lower(),
        poisson_target_sum=meta["poisson_target_sum"],
        graph_rows="first",
        **({"objective": "perturbation", "head_input": "leaking"} if leaking else {}),
    )
    subset = golden["step/gene_perm"][: meta["infer_top_gene"]]
    close(golden["in/source"][:, subset], golden["step/source_sub"])
    close(jnp.broadcast_to(genes[subset][None], golden["step/gene_ids_sub"].shape), golden["step/gene_ids_sub"])
    same = np.all(golden.arrays["in/pert_ids"] == golden.arrays["in/pert_ids"][:1])
    # One population a batch, as in the reference; a batch of several (predict_p) is as many populations of one cell.
    as_batch = (lambda x: x[None]) if same else (lambda x: x[:, None])
    batch = PairedBatch(
        source=as_batch(golden["in/source"][:, subset]),
        target=as_batch(golden["in/target"][:, subset]),
        perturbation=golden["in/pert_ids"][:1] if same else golden["in/pert_ids"],
        genes=genes[subset],
    )
    if leaking:
        loss = lambda p: scdfm.loss(p, batch, jax.random.key(0), constants=constants, config=config)  # noqa: E731
    else:
        x0, t = golden["step/x0"], golden["step/t"]
        if "step/poisson_lam" in golden.arrays:
            rates = poisson_rates(batch.source[0], target_sum=meta["poisson_target_sum"])
            close(rates, golden["step/poisson_lam"], atol=0, rtol=1e-6)
            close(jnp.log1p(golden["step/poisson_counts"]), x0)
        x_t, u_t = straight_path(x0, batch.target[0], t)
        close(x_t, golden["step/x_t"])
        close(u_t, golden["step/dx_t"])
        close(
            endpoint(x_t, golden["step/model_out"], t),
            golden.arrays.get("step/x1_hat", x_t + (1 - t[:, None]) * golden["step/model_out"]),
        )
        v = scdfm.velocity(
            params, x_t, t, batch.source[0], golden["in/pert_ids"], batch.genes, constants=constants, config=config
        )
        close(v, golden["step/model_out"])
        loss = lambda p: scdfm.loss_at(p, batch, x0[None], t[None], constants=constants, config=config)  # noqa: E731
    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, terms), grads = value_and_grad(params)
    close(total, golden["step/loss"], "loss", atol=0)
    if "mmd2" in terms:
        close(median_bandwidths(batch.target[0]), golden["step/sigmas"])
        close(terms["mmd2"], golden["step/mmd2"], atol=2e-6)
    if not leaking:
        close(terms["flow"], golden["step/mse"], atol=0)
    names, norms = golden.arrays["gradnorm/names"], golden.arrays["gradnorm/values_f64"]
    close_gradients(golden.state, config, grads, names, norms, under(golden.arrays, "grad/"))

    adam = meta["adam"]
    if not adam["steps"]:
        return
    tx = make_optimizer(
        OptimizerConfig(
            learning_rate=adam["lr"],
            schedule="cosine",
            final_fraction=adam["eta_min"] / adam["lr"],
            cosine_updates=adam["T_max"],
            clip_norm=None,
        ),
        adam["steps"],
    )
    before, opt_state, losses = params, tx.init(params), []
    for _ in range(adam["steps"]):
        (total, _), grads = value_and_grad(params)
        losses.append(total)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
    losses.append(value_and_grad(params)[0][0])
    close(jnp.stack(losses), golden.arrays["adam/losses_f64"], "losses", atol=0)
    moved = norms_by_name(golden.state, config, jax.tree.map(jnp.subtract, params, before))
    wanted = zip(golden.arrays["adam/param_names"], golden.arrays["adam/param_update_norms_f64"], strict=True)
    for name, norm in wanted:
        if moved[str(name)] == -1:
            assert norm == 0, name
            continue
        rtol = 5e-2 if name.endswith("in_proj_bias") else 1e-3
        np.testing.assert_allclose(moved[str(name)], norm, rtol=rtol, atol=1e-9, err_msg=str(name))
    ours = {name: w for name, w in under(golden.arrays, "adam/after/").items() if moved[name] != -1}
    close_named(golden.state, config, params, ours, "parameters after Adam", lambda *_: 2e-6)


@each("flow_path")
def test_path(case):
    golden = load("scdfm", case)
    x_t, u_t = straight_path(*(jnp.asarray(golden[f"in/{name}"]) for name in ("x0", "x1", "t")))
    close(x_t, golden["out/x_t"], atol=1e-7, rtol=1e-6)
    close(u_t, golden["out/dx_t"], atol=1e-7, rtol=1e-6)


@each("poisson_noise")
def test_poisson_rates(case):
    """Every recorded setting; the default of the reference's command line, -1, was a target sum like any other."""
    golden = Golden(case)
    read = 0
    for name in golden.arrays:
        if name.startswith("out/lam_"):
            setting = name.removeprefix("out/lam_")
            x = golden["in/x_log"]
            if setting == "alpha":
                rates = poisson_rates(x, alpha=golden.meta["alpha"])
            else:
                rates = poisson_rates(x, target_sum=float(setting.removeprefix("L").replace("minus", "-")))
            close(rates, golden[name], setting, atol=0, rtol=1e-6)
            floored = golden[f"out/log1p_floor_lam_{setting}"]
            close(jnp.log1p(jnp.floor(rates)), floored, setting, atol=1e-7, rtol=1e-6)
            read += 1
    assert read


@each("mmd")
def test_mmd(case):
    golden = load("scdfm", case)
    for i in sorted({name.split("/")[0] for name in golden if name[0].isdigit()}):
        x, y = jnp.asarray(golden[f"{i}/X"]), jnp.asarray(golden[f"{i}/Y"])
        close(median_bandwidths(y), golden[f"{i}/sigmas"], f"bandwidths of pair {i}")
        value, gradient = jax.value_and_grad(lambda x, y=y: mmd2(x, y, median_bandwidths(y)))(x)
        close(value, golden[f"{i}/mmd2_exact_f64"], f"pair {i}", atol=2e-6, rtol=0)
        close(value, golden[f"{i}/mmd2"], f"pair {i}, float32", atol=2e-6, rtol=0)
        close(gradient, golden[f"{i}/grad_X"], f"gradient of pair {i}", atol=1e-4 * np.abs(golden[f"{i}/grad_X"]).max())
        if np.isfinite(golden[f"{i}/biased_single_sigma1"]):
            biased = mmd2(x, y, jnp.ones(1), unbiased=False)
            close(biased, golden[f"{i}/biased_single_sigma1"], f"biased, pair {i}", atol=2e-6)


@each("cosine_schedule")
def test_learning_rate(case):
    """It climbs again past T_max, as the published run would."""
    golden = load("scdfm", case)
    meta = json.loads(str(golden["meta_json"]))
    config = OptimizerConfig(
        learning_rate=meta["lr"],
        schedule="cosine",
        final_fraction=meta["eta_min"] / meta["lr"],
        cosine_updates=meta["T_max"],
    )
    with jax.enable_x64(True):
        rates = learning_rate(config, len(golden["out/lr"]))(jnp.arange(len(golden["out/lr"])))
    close(rates, golden["out/lr"], atol=0, rtol=1e-6)


@each("rk4_solver_only")
def test_solver(case):
    golden = load("scdfm", case)
    with jax.enable_x64(True):
        a, y0 = jnp.asarray(golden["in/A"]), jnp.asarray(golden["in/y0"])
        field = lambda t, y: jnp.sin(3 * t) + y @ a - 0.3 * y**3  # noqa: E731
        for n_points in (20, 6):
            path = integrate(field, y0, n_steps=n_points - 1, trajectory=True)
            close(path, golden[f"out/traj{n_points}"], f"{n_points} points", atol=1e-13, rtol=1e-12)


@each("rk4_sample")
def test_sampling(case):
    golden = Golden(case)
    config, params, constants = golden.model(graph_rows="first")
    n_steps = golden.meta["grid_points"] - 1
    close(jnp.linspace(0, 1, n_steps + 1), golden["in/t_grid"])

    @jax.jit
    def draw(params, x0):
        source, perturbation, genes = golden["in/source"], golden["in/pert_ids"], golden["in/gene_ids"]
        bound = {"x0": x0, "constants": constants, "config": config, "n_steps": n_steps}
        path = scdfm.sample(params, source, perturbation, genes, None, trajectory=True, **bound)
        return path, scdfm.sample(params, source, perturbation, genes, None, **bound)

    path, cells = draw(params, golden["in/noise"])
    close(path, golden["out/traj"], "trajectory", atol=1e-5)
    close(cells, golden["out/sample"], "cells", atol=1e-5)

    at = np.concatenate([[0], ERK38.tableau.c])
    times = np.linspace(0, 1, n_steps + 1)[:-1, None] + at[None] / n_steps
    close(times.ravel(), golden.arrays["out/eval_times"], "times of evaluation")
    assert times.size == golden.meta["nfe"]


@each("inverse_search")
def test_inverse_search(case):
    golden = Golden(case)
    config, params, constants = golden.model(graph_rows="first", objective="perturbation", head_input="leaking")
    candidates = scdfm.perturbation_embedding(params, golden["in/candidates"], constants=constants, config=config)
    close(candidates, golden["out/cand_emb"])
    order, scores = scdfm.rank_singles(golden["in/target"], candidates)
    n = golden.arrays["out/single_ids"].shape[1]
    assert np.array_equal(order[:n], golden.arrays["out/single_ids"][0])
    close(scores[:n], golden["out/single_scores"][0])
    # The recording does not tell how many candidates were preselected: as many as its pairs are made of.
    recorded = np.union1d(golden.arrays["out/pair_i"], golden.arrays["out/pair_j"])
    n_preselected = 1 + np.flatnonzero(np.isin(order, recorded)).max()
    pairs, weights, remainders = scdfm.rank_pairs(golden["in/target"], candidates, n_preselected=int(n_preselected))
    n = len(golden.arrays["out/pair_err"])
    found, want = np.asarray(pairs[:n]), np.stack([golden.arrays["out/pair_i"], golden.arrays["out/pair_j"]], axis=-1)
    assert np.array_equal(found, want)
    close(weights[:n], golden["out/pair_w"], atol=1e-5)
    close(remainders[:n], golden["out/pair_err"], atol=1e-5)
