"""scIMF as its published PyTorch program computes it, written anew for side-by-side timing and checked on its numbers.

Same operations in the same order: the population is one batch of tokens, the solver carries the kinetic energy as one
more column, the data-data term of the Sinkhorn divergence is recomputed at every step, and one backward pass runs for
each observed time. Three things are cheaper here than there, so a comparison flatters this side: noise comes from plain
`torch.randn` (not from a Brownian tree), the time grid is exact (the published solver sometimes takes one step more),
and prediction runs under `no_grad` (not through an adjoint wrapper).

Needs torch and nothing else. Parameters carry the names of the published state dict.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ScIMF", "make_optimizer", "predict", "simulate", "sinkhorn_divergence", "train_step"]


class _NamedLinears(nn.Module):
    """Linear layers `linear1`, `linear2`, ..., `linear` with LeakyReLU(0.01) between them."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        n_layers = len(widths) - 1
        self.order = [f"linear{i + 1}" for i in range(n_layers - 1)] + ["linear"]
        for name, n_in, n_out in zip(self.order, widths[:-1], widths[1:], strict=True):
            self.add_module(name, nn.Linear(n_in, n_out))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order[:-1]:
            x = functional.leaky_relu(getattr(self, name)(x), 0.01)
        return getattr(self, self.order[-1])(x)


class _Nested(nn.Module):
    """A module under one more name, as the state dict has it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Attention(nn.Module):
    """Every cell attends to all others: row = receiver, column = sender, the diagonal masked."""

    def __init__(self, n_dims: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(n_dims, n_dims, bias=False)
        self.k_proj = nn.Linear(n_dims, n_dims, bias=False)
        self.v_proj = nn.Linear(n_dims, n_dims, bias=False)

    def _heads(self, projected: Tensor) -> Tensor:
        n_cells, n_dims = projected.shape
        return projected.view(n_cells, self.n_heads, n_dims // self.n_heads).transpose(0, 1)

    def forward(self, x: Tensor, values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(values))
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        weights = torch.softmax(logits.masked_fill(itself, -math.inf), dim=-1)
        weights = functional.dropout(weights, self.dropout, self.training)
        return (weights @ v).transpose(0, 1).reshape(x.shape), (weights, q, k, v)


class _Block(nn.Module):
    """Attention and feed-forward without a residual connection and without an output projection."""

    def __init__(self, n_dims: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(n_dims)
        self.Vnet = nn.LayerNorm(n_dims)
        self.attn = _Attention(n_dims, n_heads, dropout)
        self.norm2 = nn.LayerNorm(n_dims)
        self.fc1 = nn.Linear(n_dims, 4 * n_dims)
        self.fc2 = nn.Linear(4 * n_dims, n_dims)

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        pulled, details = self.attn(self.norm1(z), self.Vnet(z))
        return self.fc2(functional.leaky_relu(self.fc1(self.norm2(pulled)), 0.01)), details


class _Interaction(nn.Module):
    def __init__(self, n_dims: int, n_heads: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.trm_inter = nn.ModuleList(_Block(n_dims, n_heads, dropout) for _ in range(n_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        details = []
        for block in self.trm_inter:
            x, of_block = block(x)
            details.append(of_block)
        return x, details


class _LipSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.909 * functional.silu(x)


class _MlpSigma(nn.Module):
    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self._model = nn.Sequential(
            nn.Linear(n_dims, 256), _LipSwish(), nn.Linear(256, 256), _LipSwish(), nn.Linear(256, n_dims), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._model(x)


class _Diffusion(nn.Module):
    def __init__(self, n_dims: int, kind: str, sigma: float) -> None:
        super().__init__()
        if kind == "const":
            self.register_buffer("sigma", torch.full((1, n_dims), sigma))
        elif kind == "const_param":
            self.sigma = nn.Parameter(torch.randn(1, n_dims))
        elif kind == "Mlp":
            self.sigma = _MlpSigma(n_dims)
        else:
            raise ValueError(f"diffusion must be one of 'const', 'const_param', 'Mlp'; got {kind!r}.")

    def forward(self, x: Tensor) -> Tensor:
        return self.sigma(x) if isinstance(self.sigma, nn.Module) else self.sigma.expand_as(x)


class ScIMF(nn.Module):
    """Drift f(x_i) + g(x_i, {x_j : j != i}) and diagonal diffusion; `train()` and `eval()` switch the dropout."""

    def __init__(
        self,
        n_dims: int,
        *,
        n_heads: int = 2,
        n_layers: int = 1,
        intra: Sequence[int] = (256, 256),
        dropout: float = 0.1,
        diffusion: str = "const",
        sigma: float = 0.1,
    ) -> None:
        super().__init__()
        if n_dims % n_heads:
            raise ValueError(f"n_heads must divide n_dims; got n_heads={n_heads}, n_dims={n_dims}.")
        self.drift_intra = _Nested(_Nested(_NamedLinears([n_dims, *intra, n_dims])))
        self.drift_inter = _Interaction(n_dims, n_heads, n_layers, dropout)
        self.diffusion = _Diffusion(n_dims, diffusion, sigma)

    def drift(self, x: Tensor) -> Tensor:
        return self.drift_intra(x) + self.drift_inter(x)[0]

    def augmented_drift(self, state: Tensor) -> Tensor:
        """[cells, dims + 1]: the velocity, and its squared norm, which fills the energy column."""
        velocity = self.drift(state[:, :-1])
        power = torch.linalg.vector_norm(velocity, dim=1, keepdim=True) ** 2
        return torch.cat([velocity, power], dim=1)

    def augmented_diffusion(self, state: Tensor) -> Tensor:
        noise = self.diffusion(state[:, :-1])
        return torch.cat([noise, torch.zeros_like(noise[:, :1])], dim=1)


def simulate(model: ScIMF, x0: Tensor, ts: Sequence[float], *, dt: float = 0.1, dW: Tensor | None = None) -> Tensor:
    """Euler-Maruyama through all of `ts` in one go; [times, cells, dims + 1], the kinetic energy last.

    Args:
        model: whose mode decides about dropout.
        x0: [cells, dims] at `ts[0]`.
        ts: times; every gap is a whole number of steps.
        dt: step, in the unit of `ts`.
        dW: [steps, cells, dims] increments, already of variance dt; None draws them.
    """
    state = torch.cat([x0, torch.zeros_like(x0[:, :1])], dim=1)
    out, step = [state], 0
    for before, after in zip(ts, ts[1:], strict=False):
        n_steps = round((after - before) / dt)
        if n_steps < 1 or abs(n_steps * dt - (after - before)) > 1e-6:
            raise ValueError(f"dt must divide every gap of ts; got dt={dt}, ts={list(ts)}.")
        for _ in range(n_steps):
            if dW is None:
                increment = torch.randn_like(state) * math.sqrt(dt)
            else:
                increment = torch.cat([dW[step], torch.zeros_like(state[:, :1])], dim=1)
            state = state + model.augmented_drift(state) * dt + model.augmented_diffusion(state) * increment
            step += 1
        out.append(state)
    return torch.stack(out)


def predict(model: ScIMF, x0: Tensor, ts: Sequence[float], *, dt: float = 0.1) -> Tensor:
    """Simulated populations [times, cells, dims], without dropout and without gradients; noise stays on."""
    model.eval()
    with torch.no_grad():
        return simulate(model, x0, ts, dt=dt)[:, :, :-1]


def _half_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    norms_x = (x * x).sum(-1).unsqueeze(1)
    norms_y = (y * y).sum(-1).unsqueeze(0)
    return (norms_x - 2 * (x @ y.T) + norms_y) / 2


def _softmin(eps: float, cost: Tensor, h: Tensor) -> Tensor:
    return -eps * torch.logsumexp(h.unsqueeze(0) - cost / eps, dim=1)


def _temperatures(x: Tensor, y: Tensor, blur: float, scaling: float) -> list[float]:
    low = torch.minimum(x.amin(0), y.amin(0))
    high = torch.maximum(x.amax(0), y.amax(0))
    diameter = (high - low).norm().item()
    first, last, ratio = 2 * math.log(diameter), 2 * math.log(blur), 2 * math.log(scaling)
    between = [math.exp(first + k * ratio) for k in range(max(0, math.ceil((last - first) / ratio)))]
    return [diameter**2, *between, blur**2]


def sinkhorn_divergence(x: Tensor, y: Tensor, *, blur: float = 0.1, scaling: float = 0.7) -> Tensor:
    """Debiased Sinkhorn divergence for the cost |x - y|^2 / 2, one averaged iteration a temperature: not converged.

    The temperatures fall from the squared diagonal of the joint bounding box to blur^2. The gradient goes through one
    last update only, potentials and the points of the columns held fixed.
    """
    log_a = torch.full_like(x[:, 0].detach(), -math.log(len(x)))
    log_b = torch.full_like(y[:, 0].detach(), -math.log(len(y)))
    cost_xy, cost_yx = _half_squared_distances(x, y.detach()), _half_squared_distances(y, x.detach())
    cost_xx, cost_yy = _half_squared_distances(x, x.detach()), _half_squared_distances(y, y.detach())
    with torch.no_grad():
        temperatures = _temperatures(x, y, blur, scaling)
        eps = temperatures[0]
        f, g = _softmin(eps, cost_xy, log_b), _softmin(eps, cost_yx, log_a)
        p, q = _softmin(eps, cost_xx, log_a), _softmin(eps, cost_yy, log_b)
        for eps in temperatures:
            f_new, g_new = _softmin(eps, cost_xy, log_b + g / eps), _softmin(eps, cost_yx, log_a + f / eps)
            p_new, q_new = _softmin(eps, cost_xx, log_a + p / eps), _softmin(eps, cost_yy, log_b + q / eps)
            f, g, p, q = (f + f_new) / 2, (g + g_new) / 2, (p + p_new) / 2, (q + q_new) / 2
    f_last, g_last = _softmin(eps, cost_xy, log_b + g / eps), _softmin(eps, cost_yx, log_a + f / eps)
    p_last, q_last = _softmin(eps, cost_xx, log_a + p / eps), _softmin(eps, cost_yy, log_b + q / eps)
    return (f_last - p_last).mean() + (g_last - q_last).mean()


def make_optimizer(
    model: ScIMF, *, learning_rate: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, and a rate that falls by a tenth every 100 steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=betas, eps=eps)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.9)


def backward(
    model: ScIMF,
    x0: Tensor,
    targets: Sequence[Tensor],
    ts: Sequence[float],
    *,
    dt: float = 0.1,
    dW: Tensor | None = None,
    marginal=sinkhorn_divergence,
    single_backward: bool = False,
) -> dict[str, Tensor]:
    """Fills the gradients of mean_k marginal(target_k, x(t_k)) + mean_i energy_i(t_K) / (t_K - t_0); returns the terms.

    Args:
        model: whose mode decides about dropout.
        x0: [cells, dims] at `ts[0]`.
        targets: one population [cells of the time, dims] for each of `ts[1:]`.
        ts: times, the first being that of `x0`.
        dt: step, in the unit of `ts`.
        dW: recorded increments; None draws them.
        marginal: distance of an observed and a simulated population.
        single_backward: one pass over the sum, which the published program does not do; the gradient is the same up to
            rounding.
    """
    path = simulate(model, x0, ts, dt=dt, dW=dW)
    energy = path[-1, :, -1].mean() / (ts[-1] - ts[0])
    marginals, total = [], 0.0
    for k, target in enumerate(targets):
        distance = marginal(target, path[k + 1, :, :-1])
        marginals.append(distance.detach())
        is_last = k == len(targets) - 1
        part = distance / len(targets) + (energy if is_last else 0.0)
        if single_backward:
            total = total + part
        else:
            part.backward(retain_graph=not is_last)
    if single_backward:
        total.backward()
    marginals = torch.stack(marginals)
    return {"loss": marginals.mean() + energy.detach(), "marginal": marginals, "energy": energy.detach()}


def train_step(
    model: ScIMF,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    x0: Tensor,
    targets: Sequence[Tensor],
    ts: Sequence[float],
    *,
    clip: float = 0.1,
    **settings,
) -> dict[str, Tensor]:
    """One step of the published loop: gradients, global-norm clip, Adam, its schedule; `settings` go to `backward`."""
    optimizer.zero_grad()
    terms = backward(model, x0, targets, ts, **settings)
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    scheduler.step()
    return terms
