"""The PyTorch peer of the benchmarks computes what the published scIMF computes."""

import importlib.util
from functools import partial
from pathlib import Path

import goldens
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="benchmarks' other side; of the extra 'torch'")

ROOT = Path(__file__).parents[2]
FOLDER = goldens.FOLDER / "scimf"

_spec = importlib.util.spec_from_file_location("torch_scimf", ROOT / "benchmarks" / "peers" / "torch_scimf.py")
peer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peer)

SCALING = {"sink07": 0.7, "sink99": 0.99}


def cases(kind):
    """The cases of one kind by the start of their names; one skipped case where the folder is absent."""
    if absence := goldens.absence("scimf"):
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=absence))]
    paths = sorted(p for p in FOLDER.glob(f"{kind}_*.npz") if not p.name.endswith(".f64.npz"))
    return [pytest.param(p, id=p.stem) for p in paths]


def load(path):
    """A case and its float64 outputs."""
    with np.load(path) as single, np.load(path.with_suffix(".f64.npz")) as double:
        return dict(single), dict(double)


def tensor(values):
    return torch.as_tensor(np.asarray(values, np.float64))


def model_of(case):
    """The peer with the weights of a case, in float64, without dropout."""
    model = peer.ScIMF(
        int(case["cfg/d"]),
        n_heads=int(case["cfg/heads"]),
        n_layers=int(case["cfg/layers"]),
        intra=[int(width) for width in case["cfg/intra"]],
        diffusion=str(case.get("cfg/sigma_type", "const")),
        sigma=float(case.get("cfg/sigma", 0.1)),
    ).double()
    model.load_state_dict({name[2:]: tensor(value) for name, value in case.items() if name.startswith("w/")})
    return model.eval()


def close(got, wanted, tolerance):
    """The error relative to 1 + the largest entry."""
    wanted = np.asarray(wanted)
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= tolerance * (1 + np.abs(wanted).max())


@pytest.mark.parametrize("path", cases("mod"))
def test_drift_and_diffusion(path):
    case, wanted = load(path)
    model, x = model_of(case), tensor(case["in/x"])
    state = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    inter, details = model.drift_inter(x)
    close(model.drift_intra(x), wanted["out/intra"], 1e-11)
    for layer, tensors in enumerate(details):
        for name, got in zip(("attn", "q", "k", "v"), tensors, strict=True):
            close(got, wanted[f"out/block{layer}/{name}"], 1e-11)
    close(inter, wanted["out/inter"], 1e-11)
    close(model.augmented_drift(state), wanted["out/f"], 1e-11)
    close(model.augmented_diffusion(state), wanted["out/g"], 1e-11)


@pytest.mark.parametrize("path", cases("traj"))
def test_replayed_noise_gives_the_recorded_path(path):
    case, wanted = load(path)
    x0 = tensor(case["in/x0"])
    dW = tensor(case["in/dW"]) if "in/dW" in case else torch.zeros(int(case["cfg/n_steps"]), *x0.shape).double()
    dt, ts = float(case["cfg/dt"]), case["in/ts"].tolist()
    path_at_ts = peer.simulate(model_of(case), x0, ts, dt=dt, dW=dW)
    close(path_at_ts[:, :, :-1], wanted["out/x_obs"], 1e-10)
    close(path_at_ts[:, :, -1], wanted["out/e_obs"], 1e-10)


@pytest.mark.parametrize("path", cases("sinkhorn"))
def test_sinkhorn_values_and_gradients(path):
    case, wanted = load(path)
    blur = float(case["cfg/blur"])
    for pair in range(int(case["cfg/n_pairs"])):
        at = f"pair{pair}"
        scalings = [key.removeprefix(f"{at}/S_scal") for key in wanted if key.startswith(f"{at}/S_scal")]
        assert scalings
        for scaling in scalings:
            x, y = tensor(case[f"{at}/x"]), tensor(case[f"{at}/y"]).requires_grad_()
            value = peer.sinkhorn_divergence(x, y, blur=blur, scaling=float(scaling))
            close(value, wanted[f"{at}/S_scal{scaling}"], 1e-10)
            if f"{at}/grad_y_scal{scaling}" in wanted:
                (got,) = torch.autograd.grad(value, y)
                gradient = wanted[f"{at}/grad_y_scal{scaling}"]
                assert np.abs(got.numpy() - gradient).max() <= 1e-8 * np.abs(gradient).max() + 1e-12


def paired_squares(target, x):
    return ((x - target) ** 2).sum(1).mean()


def objectives(path):
    wanted = load(path)[1]
    return [name for name in ("quad", *SCALING) if f"loss_{name}/total" in wanted]


@pytest.mark.parametrize("single_backward", [False, True], ids=["backward-per-time", "single-backward"])
@pytest.mark.parametrize("path", cases("grad"))
def test_gradients_of_the_loss(path, single_backward):
    case, wanted = load(path)
    for objective in objectives(path):
        quad = objective == "quad"
        model = model_of(case)
        ts, x0 = case["in/ts"].tolist(), tensor(case["in/x0"])
        terms = peer.backward(
            model,
            x0,
            [tensor(case[f"in/{'quad_' if quad else ''}target{k + 1}"]) for k in range(len(ts) - 1)],
            ts,
            dt=float(case["cfg/dt"]),
            dW=torch.zeros(int(case["cfg/n_steps"]), *x0.shape).double(),
            marginal=paired_squares if quad else partial(peer.sinkhorn_divergence, scaling=SCALING[objective]),
            single_backward=single_backward,
        )
        close(terms["loss"], wanted[f"loss_{objective}/total"], 1e-10)
        close(terms["marginal"], wanted[f"loss_{objective}/marginal"], 1e-10)
        close(terms["energy"], wanted[f"loss_{objective}/energy"], 1e-10)
        for name, parameter in model.named_parameters():
            gradient = wanted[f"grad_{objective}/{name}"]
            error = np.linalg.norm(parameter.grad.numpy() - gradient)
            assert error <= (1e-9 if quad else 1e-7) * np.linalg.norm(gradient), (objective, name)


@pytest.mark.parametrize("path", cases("grad"))
def test_clipped_adam_steps(path):
    case, wanted = load(path)
    if "adam/hyper" not in wanted:
        pytest.skip("no optimiser steps were recorded for this case")
    learning_rate, b1, b2, eps, clip = (float(value) for value in wanted["adam/hyper"])
    model = model_of(case)
    optimizer, scheduler = peer.make_optimizer(model, learning_rate=learning_rate, betas=(b1, b2), eps=eps)
    ts, x0 = case["in/ts"].tolist(), tensor(case["in/x0"])
    targets = [tensor(case[f"in/target{k + 1}"]) for k in range(len(ts) - 1)]
    dW = torch.zeros(int(case["cfg/n_steps"]), *x0.shape).double()
    assert any(key.startswith("adam_after3/") for key in wanted)
    for step, loss in enumerate(wanted["adam/losses"], start=1):
        dt = float(case["cfg/dt"])
        terms = peer.train_step(model, optimizer, scheduler, x0, targets, ts, clip=clip, dt=dt, dW=dW)
        close(terms["loss"], loss, 1e-9)
        tolerance = 1e-9 if step == 1 else 1e-7
        for name, parameter in model.named_parameters():
            if f"adam_after{step}/{name}" in wanted:
                close(parameter, wanted[f"adam_after{step}/{name}"], tolerance)


def test_dropout_and_noise_are_on_in_training_and_off_where_they_should_be():
    torch.manual_seed(0)
    model, x = peer.ScIMF(6, intra=[8]), torch.randn(5, 6)
    model.train()
    assert not torch.equal(model.drift(x), model.drift(x))
    first, second = peer.predict(model, x, [0, 1]), peer.predict(model, x, [0, 1])
    assert first.shape == (2, 5, 6)
    assert not torch.equal(first[1], second[1])  # the SDE's own noise stays on
    assert torch.equal(model.drift(x), model.drift(x))  # prediction leaves evaluation mode on


def test_a_step_that_does_not_divide_the_times_is_refused():
    with pytest.raises(ValueError, match="dt must divide every gap of ts; got dt=0.3"):
        peer.simulate(peer.ScIMF(4, intra=[8]), torch.zeros(3, 4), [0, 1], dt=0.3)


def test_the_learning_rate_falls_by_a_tenth_every_hundred_steps():
    model = peer.ScIMF(4, intra=[8])
    optimizer, scheduler = peer.make_optimizer(model)
    for _ in range(100):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([9e-4])
