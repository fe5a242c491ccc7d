"""The PyTorch peer of the benchmarks computes what the published PerturbDiff computes."""

import importlib.util
from pathlib import Path

import goldens
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="benchmarks' other side; of the extra 'torch'")

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location(
    "torch_perturbdiff", ROOT / "benchmarks" / "peers" / "torch_perturbdiff.py"
)
peer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peer)

KINDS = ("backbone_det_", "backbone_", "block_", "diffusion_", "losses_", "sampling_", "trainloss_", "trainsteps_")
CASES = goldens.cases("perturbdiff", KINDS)
UNUSED = "gene_embedding.gene_embedding."  # the recordings leave it out; nothing depends on it
COVARIATES = ("cov_pert", "cov_celltype", "cov_batch")
LOSSES = ("plain", "selfcond", "dropcond", "dropcond_selfcond", "dropcontrol")


def each(kind):
    return pytest.mark.parametrize("case", goldens.or_absent("perturbdiff", kind, CASES[kind]))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recorded():
    goldens.require("perturbdiff")
    return lambda case: goldens.load("perturbdiff", case)


def tensors(arrays, prefix=""):
    """Numbers alone; names stay behind."""
    values = goldens.under(arrays, prefix).items()
    return {name: torch.from_numpy(value) for name, value in values if value.dtype.kind in "bif"}


def close(got, wanted, *, of_largest, err_msg=""):
    """Within a share of the largest entry."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(
        got.detach().numpy(), wanted, rtol=0, atol=of_largest * max(np.abs(wanted).max(), 1e-12), err_msg=err_msg
    )


def load_weights(module, arrays, prefix="w/"):
    missing, unexpected = module.load_state_dict(tensors(arrays, prefix), strict=False)
    assert not unexpected
    assert all(UNUSED in name for name in missing)
    return module


def backbone_of(arrays):
    return peer.Backbone(
        int(arrays["genes"]),
        d_model=int(arrays["hidden"]),
        n_layers=int(arrays["depth"]),
        n_heads=int(arrays["heads"]),
        class_silu=bool(arrays.get("use_class_silu", False)),
    )


def model_of(arrays, prefix="w/"):
    weights = goldens.under(arrays, prefix)
    model = peer.PerturbDiff(
        int(arrays["genes"]),
        n_perturbations=len(weights["cov_encoder.pert_encoder.weight"]) - 1,
        n_cell_types=len(weights["cov_encoder.celltype_encoder.weight"]),
        n_batches=len(weights["cov_encoder.batch_encoder.weight"]),
        d_covariate=weights["cov_encoder.pert_encoder.weight"].shape[1],
        d_model=int(arrays["hidden"]),
        n_layers=int(arrays["depth"]),
        n_heads=int(arrays["heads"]),
    )
    return load_weights(model, arrays, prefix)


def batch_of(arrays, prefix=""):
    given = tensors(arrays, prefix)
    return given["pert_emb"], given["cont_emb"], tuple(given[name] for name in COVARIATES)


@each("block_")
def test_block(case, recorded):
    arrays = recorded(case)
    block = peer._Block(int(arrays["hidden"]), int(arrays["heads"]), float(arrays["mlp_ratio"]))
    block = load_weights(block, arrays)
    x, x_control, c = (torch.from_numpy(arrays[name]).requires_grad_() for name in ("x", "x_control", "c"))
    out, out_control = block(x, x_control, c)
    close(out, arrays["out_x"], of_largest=2e-6)
    close(out_control, arrays["out_x_control"], of_largest=2e-6)
    close(block.attn(torch.from_numpy(arrays["attn_in"])), arrays["attn_out"], of_largest=2e-6)
    single, single_control = block(x, x_control, torch.from_numpy(arrays["c_single"]))
    close(single, arrays["out_x_csingle"], of_largest=2e-6)
    close(single_control, arrays["out_x_control_csingle"], of_largest=2e-6)
    (out * torch.from_numpy(arrays["r1"])).sum().add((out_control * torch.from_numpy(arrays["r2"])).sum()).backward()
    gradients = {
        "grad_x": x.grad,
        "grad_x_control": x_control.grad,
        "grad_c": c.grad,
        "grad_qkv_weight": block.attn.qkv.weight.grad,
        "grad_q_norm": block.attn.q_norm.weight.grad,
        "grad_adaln_weight": block.adaLN_modulation[1].weight.grad,
    }
    for name, gradient in gradients.items():
        close(gradient, arrays[name], of_largest=1e-5, err_msg=name)


@each("backbone_")
def test_backbone(case, recorded):
    arrays = recorded(case)
    if str(arrays["separate_embedder"]) != "False":
        # Not an unfinished check: the peer is there to be timed, and several projections would be timed as one.
        pytest.skip("the peer has one input projection; those of several data sets cost the same")
    network, given = load_weights(backbone_of(arrays), arrays), tensors(arrays)
    x, control, t = given["x_in"], given["control_in"], given["t"]
    for condition, prefix in ((given["cov_emb"], ""), (None, "uncond_")):
        out, out_control = network(x, control, t, condition)
        close(out, arrays[f"{prefix}out_x"], of_largest=3e-5)
        close(out_control, arrays[f"{prefix}out_x_control"], of_largest=3e-5)
    hidden, hidden_control, _ = network.tokens(x, control, t, given["cov_emb"])
    close(hidden, arrays["out_pert_hidden"], of_largest=3e-5)
    close(hidden_control, arrays["out_control_hidden"], of_largest=3e-5)


def generated(name, shape, k, salt):
    """Weights of the wide case: a formula of place and position, as the recordings' README gives it."""
    i = np.arange(np.prod(shape, dtype=np.uint64), dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    h = (np.uint64(2654435761) * i + np.uint64((40503 * (k + 1) + salt) % 2**32)) & mask
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    u = 2 * (h.astype(np.float64) + 0.5) / 2**32 - 1
    if name.endswith(("q_norm.weight", "k_norm.weight", "layer_norm.weight")):
        u = 1 + 0.1 * u
    elif name.endswith("bias"):
        u = 0.05 * u
    elif "null_emb" in name:
        u = 0.5 * u
    else:
        u = u * np.sqrt(3 / shape[-1])
    return u.astype(np.float32).reshape(shape)


@each("backbone_det_")
def test_published_width(case, recorded):
    arrays = recorded(case)
    network, given = backbone_of(arrays), tensors(arrays)
    parameters = dict(network.named_parameters())
    names = [str(name) for name in arrays["sorted_param_names"]]
    assert sorted(parameters) == names
    with torch.no_grad():
        for k, name in enumerate(names):
            values = generated(name, tuple(parameters[name].shape), k, int(arrays["salt"]))
            np.testing.assert_allclose(
                values.astype(np.float64).sum(), arrays["param_checksum"][k], rtol=1e-9, atol=1e-6
            )
            parameters[name].copy_(torch.from_numpy(values))
    out, out_control = network(given["x_in"], given["control_in"], given["t"], given["cov_emb"])
    close(out, arrays["out_x"], of_largest=3e-5)
    close(out_control, arrays["out_x_control"], of_largest=3e-5)
    target = given["target"]
    total = (target - out).square().mean() + peer.energy(target, out).mean()
    np.testing.assert_allclose(total.item(), arrays["loss"], rtol=3e-4)
    total.backward()
    for name, norm in zip(names, arrays["grad_norm_by_sorted_name"], strict=True):
        if norm < 0:  # never used
            assert parameters[name].grad is None, name
        else:
            np.testing.assert_allclose(parameters[name].grad.norm(), norm, rtol=2e-4, err_msg=name)


@each("diffusion_")
def test_schedule(case, recorded):
    arrays = recorded(case)
    assert str(arrays["schedule"]) == "linear"
    diffusion, t = peer.linear_diffusion(int(arrays["steps"])), arrays["t"]
    np.testing.assert_allclose(diffusion.posterior_variance[t], arrays["posterior_variance"], rtol=1e-6)
    np.testing.assert_allclose((1 - diffusion.alpha_bars)[t], arrays["q_variance"].reshape(len(t), -1)[:, 0], rtol=1e-6)


@each("losses_")
def test_losses(case, recorded):
    arrays = recorded(case)
    target, output = torch.from_numpy(arrays["target"]), torch.from_numpy(arrays["output"]).requires_grad_()
    value = peer.energy(output, target)
    np.testing.assert_allclose(value.detach(), arrays["energy_f64"], rtol=5e-4)
    value.mean().backward()
    close(output.grad, arrays["energy_grad_of_mean_wrt_output"], of_largest=1e-3)

    exact = torch.from_numpy(arrays["output"]).double().requires_grad_()
    value = peer.energy(exact, target.double())
    np.testing.assert_allclose(value.detach(), arrays["energy_f64"], rtol=1e-9)
    value.mean().backward()
    close(exact.grad, arrays["energy_grad_f64"], of_largest=1e-6)


@pytest.mark.parametrize("what", LOSSES)
@each("trainloss_")
def test_training_loss(case, what, recorded):
    arrays = recorded(case)
    model, diffusion = model_of(arrays), peer.linear_diffusion()
    fixed = {
        "t": torch.from_numpy(arrays["t"]),
        "noise": torch.from_numpy(arrays["noise"]).double(),
        "drop_condition": "dropcond" in what,
        "drop_control": what == "dropcontrol",
        "self_condition": "selfcond" in what or what == "dropcontrol",
    }
    batch = batch_of(arrays)
    terms = peer.loss(model, diffusion, *batch, energy_weight=float(arrays["mmd_factor"]), **fixed)
    np.testing.assert_allclose(terms.mse, arrays[f"{what}/mse_per_set"], rtol=1e-5)
    np.testing.assert_allclose(terms.energy, arrays[f"{what}/mmd_per_set"], rtol=3e-4)
    np.testing.assert_allclose(terms.total.item(), arrays[f"{what}/loss"], rtol=3e-4)
    lighter = peer.loss(model, diffusion, *batch, energy_weight=0.3, log_again=False, **fixed)
    np.testing.assert_allclose(lighter.total.item(), arrays[f"{what}/loss_mmd_factor_0.3"], rtol=3e-4)
    np.testing.assert_array_equal(lighter.energy, terms.energy)

    terms.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(map(str, arrays[f"{what}/grad_names"]))
    for name, norm in zip(arrays[f"{what}/grad_names"], arrays[f"{what}/grad_norms"], strict=True):
        np.testing.assert_allclose(gradients[str(name)].norm(), norm, rtol=1e-4, err_msg=name)
    for name, wanted in goldens.under(arrays, f"{what}/grad/").items():
        close(gradients[name], wanted, of_largest=2e-4, err_msg=name)


@each("trainsteps_")
def test_training_steps(case, recorded):
    arrays = recorded(case)
    model, diffusion = model_of(arrays, "w0/"), peer.linear_diffusion()
    assert arrays["clip"] == 1.0
    assert arrays["ema_decay"] == 0.99
    optimizer, scheduler = peer.make_optimizer(
        model,
        learning_rate=float(arrays["lr"]),
        n_warmup=int(arrays["warmup"]),
        plateau=float(arrays["plateau_ratio"]),
        n_steps=int(arrays["total"]),
        floor=float(arrays["min_ratio"]),
        weight_decay=float(arrays["weight_decay"]),
    )
    spared = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in spared} == set(map(str, arrays["nodecay_names"]))
    average = peer.Average(model, float(arrays["ema_decay"]), int(arrays["ema_every"]))
    losses, norms, rates = [], [], []
    for n in range(int(arrays["nsteps"])):
        at = f"step{n}/"
        fixed = {
            "t": torch.from_numpy(arrays[f"{at}t"]),
            "noise": torch.from_numpy(arrays[f"{at}noise"]).double(),
            "drop_condition": bool(arrays[f"{at}drop_cond"]),
            "self_condition": bool(arrays[f"{at}selfcond"]),
        }
        rates.append(scheduler.get_last_lr()[0])
        terms, norm = peer.train_step(
            model, diffusion, optimizer, scheduler, average, n, *batch_of(arrays, at), **fixed
        )
        losses.append(terms.total.item())
        norms.append(norm.item())
    np.testing.assert_allclose(rates, arrays["lrs"], rtol=1e-6)
    np.testing.assert_allclose(losses, arrays["losses"], rtol=2e-4)
    np.testing.assert_allclose(norms, arrays["grad_norms"], rtol=1e-4)
    after, averaged = model.state_dict(), average.model.state_dict()
    for name, wanted in goldens.under(arrays, "w1/").items():
        np.testing.assert_allclose(after[name], wanted, rtol=0, atol=1e-4, err_msg=name)
    for name, wanted in goldens.under(arrays, "ema/").items():
        np.testing.assert_allclose(averaged[name], wanted, rtol=0, atol=1e-5, err_msg=name)


@each("trainsteps_")
def test_the_learning_rate_of_the_published_runs(case, recorded):
    arrays = recorded(case)
    _, scheduler = peer.make_optimizer(torch.nn.Linear(1, 1))
    got = [scheduler.lr_lambdas[0](int(step)) for step in arrays["readme_lr_steps"]]
    np.testing.assert_allclose(got, arrays["readme_lr_multiplier"], rtol=1e-6)


@each("sampling_")
def test_reverse_steps(case, recorded):
    arrays = recorded(case)
    if str(arrays["schedule"]) != "linear":
        # A schedule is a table that costs nothing; the published runs, for whose time the peer stands, have this one.
        pytest.skip("the peer has the linear schedule only")
    model, diffusion, given = model_of(arrays), peer.linear_diffusion(int(arrays["steps"])), tensors(arrays)
    condition = model.cov_encoder(*(given[name] for name in COVARIATES)).detach()
    close(condition, arrays["cov_emb"], of_largest=2e-6)
    for t in arrays["step_t"]:
        times = torch.full((len(given["x"]),), int(t))
        for w in arrays["guidances"]:

            def step(**settings):
                state = given["x"], times, given["prev_pred"], given["cont_emb"], condition  # noqa: B023
                settings |= {"guidance": float(w), "noise": given["step_noise"]}  # noqa: B023
                return peer.reverse_step(model, diffusion, *state, **settings)

            at = f"t{t}/w{w:.1f}/"
            large = step(sampler="ddpm")
            close(large.x0, arrays[f"{at}pred_xstart"], of_largest=5e-4)
            close(large.mean, arrays[f"{at}mean"], of_largest=5e-4)
            np.testing.assert_allclose(large.variance.unique(), [arrays[f"{at}variance"]], rtol=1e-5)
            np.testing.assert_allclose(large.log_variance.unique(), [arrays[f"{at}log_variance"]], rtol=1e-5)
            close(large.x, arrays[f"{at}ddpm_fixed_large"], of_largest=5e-4)
            if f"{at}ddpm_fixed_small" in arrays:
                small = step(sampler="ddpm", small_variance=True)
                close(small.x, arrays[f"{at}ddpm_fixed_small"], of_largest=5e-4)
            for eta in (0.0, 0.7):
                close(step(eta=eta).x, arrays[f"{at}ddim_eta{eta}"], of_largest=5e-4)


@each("sampling_")
def test_sampling(case, recorded):
    arrays = recorded(case)
    model, diffusion = model_of(arrays), peer.linear_diffusion(int(arrays["steps"]))
    _, control, covariates = batch_of(arrays)
    calls = []
    model.model.register_forward_pre_hook(lambda _, inputs: calls.append((int(inputs[2][0]), inputs[3] is None)))
    start, n = torch.from_numpy(arrays["loop_init"]), int(arrays["loop_from"])
    got = peer.sample(model, diffusion, control, covariates, start=n, x=start)
    close(got, arrays["ddim_loop_samples"][-1], of_largest=5e-4)
    assert calls == [(t, free) for t in range(n - 1, -1, -1) for free in (False, True)]  # one after the other
    two = peer.sample(model, diffusion, control, covariates, start=n, n_steps=2, x=start)
    close(two, arrays["ddim_loop_samples"][1], of_largest=5e-4)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = peer.PerturbDiff(6, n_perturbations=2, n_cell_types=2, n_batches=2, d_model=8, n_layers=1, n_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.zeros(2, 5, dtype=torch.int64)
    return model, (torch.rand(2, 5, 6), torch.rand(2, 5, 6), (ids, ids, ids))


def test_coins_fall_for_the_whole_batch(tiny):
    """Without fixed coins half of the steps call the network twice, and half drop the condition."""
    model, batch = tiny
    calls = []
    model.model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[3] is None))
    n = 200
    for _ in range(n):
        before = len(calls)
        peer.loss(model, peer.linear_diffusion(), *batch)
        assert len(set(calls[before:])) == 1  # both passes under one condition
    assert abs(len(calls) - 1.5 * n) < 40  # six standard deviations
    assert abs(sum(calls) - len(calls) / 2) < 80


def test_published_initialisation():
    """Blocks are the identity, so that the prediction does not depend on the time; the sizes are the published ones."""
    model = peer.Backbone(12, d_model=16, n_layers=2, n_heads=2)
    x, control, condition = torch.rand(1, 3, 24), torch.rand(1, 3, 24), torch.rand(1, 3, 12)
    early, late = (model(x, control, torch.tensor([t]), condition)[0] for t in (0, 900))
    assert torch.equal(early, late)
    with torch.device("meta"):
        n = sum(p.numel() for p in peer.Backbone(2000).parameters())
    assert round(n / 1e6, 1) == 103.6


def test_wrong_settings_are_refused(tiny):
    model, (x, control, covariates) = tiny
    with pytest.raises(ValueError, match="n_heads must divide 2 d_model; got n_heads=3, d_model=8"):
        peer.Backbone(6, d_model=8, n_heads=3)
    with pytest.raises(ValueError, match="sampler must be one of 'ddim', 'ddpm'; got 'euler'"):
        peer.sample(model, peer.linear_diffusion(), control, covariates, sampler="euler")
