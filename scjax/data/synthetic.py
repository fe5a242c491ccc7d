"""Populations whose answers are known.

In time: interacting particles, an Ornstein-Uhlenbeck process, a shifted Gaussian. Perturbed: Gaussians shifted by each
condition, and single effects that add up in doubles, or do not. Populations that are themselves drawn: sets of cells
whose mixture, shift or mean differs from set to set, and nobody tells.

Everything here is NumPy in float64; `to_anndata` and the methods of that name make what the rest of `data` reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float

from scjax.check import at_least, increasing, non_negative, one_of, positive, suggestion
from scjax.data.spec import AnnData

__all__ = [
    "AdditiveEpistasis",
    "CellSets",
    "GaussianPopulations",
    "GaussianShift",
    "GaussianShifts",
    "InteractingParticles",
    "OrnsteinUhlenbeck",
    "PerturbedCells",
    "Snapshots",
    "VaryingMixtures",
    "to_anndata",
]

_N_NAMED = 4  # coordinates with a meaning, before the idle ones
_U1, _U2, _SIGNAL, _RESPONSE = range(_N_NAMED)


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshots:
    """Cells seen once each: the cells of one time are not those of another.

    Attributes:
        x: float64[cells, dims].
        time: of each cell.
        kind: what each cell is, in words; hidden from a model.
    """

    x: Float[np.ndarray, "cells dims"]
    time: Float[np.ndarray, " cells"]
    kind: np.ndarray

    def at(self, time: float) -> Float[np.ndarray, "n dims"]:
        return self.x[self.time == time]


@dataclass(frozen=True, kw_only=True)
class InteractingParticles:
    """A McKean-Vlasov process in which all cells move as a few of them tell, and what those tell changes.

    A state is (u1, u2, signal, response, idle...). With J the quarter turn,

        du        = omega gate(signal) J u dt + sigma dW          gate = 1 for senders, 0 for receivers, smooth between
        dsignal   = 0                                             senders near +level, receivers around -level
        dresponse = gain sum_j a_ij u1_j dt + sigma dW
        didle     = sigma dW
        a_ij      = exp(sharpness signal_j) / sum_{k != i} exp(sharpness signal_k),     a_ii = 0

    A few senders circle in step from (+radius, 0). The many receivers have u of any direction, which does not turn, so
    the plain mean of the population drowns the senders: a model has to know whom to listen to. The response of every
    cell goes to and fro with the senders' u1, so that a receiver comes through the same state with both velocities. No
    drift f(x) of the cell alone can give it that, unless it carries a clock: a displacement in some coordinate that
    tells the time. Receivers are spread wide in every coordinate, so that a readable clock is a large error.

    The drift is a function of the states alone: kinds are read off the signal. Without senders (`n_senders=0`) all
    listen to the loudest receivers, who do not turn, and no response comes back: a known answer to a question that is
    never asked in training.
    """

    n_dims: int = 4
    radius: float = 3.0  # state units
    omega: float = 0.5 * np.pi  # radians per time unit: one turn in 4
    level: float = 3.0  # of the signal, state units
    gain: float = 1.5  # of the response, per time unit
    sharpness: float = 2.0  # of the kernel, per state unit of the signal
    sigma: float = 0.1  # state units per sqrt(time unit)
    sender_spread: float = 0.3  # standard deviation of u and signal of the senders at the start
    spread: float = 1.0  # of every other coordinate, and of u and signal of the receivers

    def __post_init__(self):
        at_least("n_dims", self.n_dims, _N_NAMED)
        for name in ("radius", "level", "gain", "sharpness", "sender_spread", "spread"):
            positive(name, getattr(self, name))
        non_negative("sigma", self.sigma)

    def kernel(self, x: Float[np.ndarray, "cells dims"]) -> Float[np.ndarray, "cells cells"]:
        """a: how much receiver (row) listens to sender (column). Rows sum to 1, the diagonal is 0."""
        a = np.broadcast_to(self._loudness(x), (len(x), len(x))).copy()
        np.fill_diagonal(a, 0.0)
        return a / a.sum(axis=1, keepdims=True)

    def intrinsic(self, x: Float[np.ndarray, "cells dims"]) -> Float[np.ndarray, "cells dims"]:
        """The part of the drift that is the cell's own."""
        f = np.zeros_like(x)
        speed = self.omega * 0.5 * (1 + np.tanh(10 * (x[:, _SIGNAL] / self.level - 0.5)))
        f[:, _U1], f[:, _U2] = -speed * x[:, _U2], speed * x[:, _U1]
        return f

    def interaction(self, x: Float[np.ndarray, "cells dims"]) -> Float[np.ndarray, "cells dims"]:
        """The part that the others give: gain * kernel(x) @ u1, in the response only; zero for a cell alone."""
        f = np.zeros_like(x)
        if len(x) > 1:
            # kernel(x) @ u1 in O(cells): the sums over all, less one's own part
            loudness = self._loudness(x)
            heard = np.sum(loudness * x[:, _U1]) - loudness * x[:, _U1]
            f[:, _RESPONSE] = self.gain * heard / (np.sum(loudness) - loudness)
        return f

    def drift(self, x: Float[np.ndarray, "cells dims"]) -> Float[np.ndarray, "cells dims"]:
        return self.intrinsic(x) + self.interaction(x)

    def diffusion(self) -> Float[np.ndarray, " dims"]:
        g = np.full(self.n_dims, self.sigma)
        g[_SIGNAL] = 0.0
        return g

    def start(self, rng: np.random.Generator, *, n_senders: int, n_receivers: int) -> Float[np.ndarray, "cells dims"]:
        """Cells at time 0, the senders first."""
        x = self.spread * rng.standard_normal((n_senders + n_receivers, self.n_dims))
        told = [_U1, _U2, _SIGNAL]
        x[:n_senders, told] *= self.sender_spread / self.spread
        x[:n_senders, told] += (self.radius, 0.0, self.level)
        x[n_senders:, _SIGNAL] -= self.level
        x[n_senders:, [_U1, _U2]] *= self.radius / (np.sqrt(2) * self.spread)  # as long as a sender's, on average
        return x

    def simulate(
        self, times: Sequence[float], *, seed: int, n_senders: int = 40, n_receivers: int = 360, dt: float = 0.01
    ) -> Snapshots:
        """A population of its own for each of `times`, all from time 0, by stochastic Heun steps of at most `dt`.

        Raises:
            ValueError: times that do not increase or begin before 0, dt not positive, fewer than two cells.
        """
        times = increasing("times", times)
        non_negative("the first of times", times[0])
        positive("dt", dt)
        at_least("the number of cells", n_senders + n_receivers, 2)
        snapshots = []
        for i, time in enumerate(times):
            rng = np.random.default_rng([seed, i])
            x = self.start(rng, n_senders=n_senders, n_receivers=n_receivers)
            n_steps = int(np.ceil(time / dt))
            for _ in range(n_steps):
                x = self._step(x, time / n_steps, rng.standard_normal(x.shape))
            snapshots.append(x)
        kind = np.repeat(("sender", "receiver"), (n_senders, n_receivers))
        return Snapshots(x=np.concatenate(snapshots), time=np.repeat(times, len(kind)), kind=np.tile(kind, len(times)))

    def mean_response(self, time: float, *, n_senders: int = 40, n_receivers: int = 360) -> float:
        """Mean response at `time` of infinitely many cells in these proportions, in closed form.

        Signals are Gaussian and independent of u1, so the kernel hears c radius cos(omega t) with c the share of the
        senders in all loudness.
        """
        half_squared = 0.5 * self.sharpness**2
        senders = n_senders * np.exp(self.sharpness * self.level + half_squared * self.sender_spread**2)
        receivers = n_receivers * np.exp(-self.sharpness * self.level + half_squared * self.spread**2)
        heard = self.radius * senders / (senders + receivers)
        return float(self.gain * heard * np.sin(self.omega * time) / self.omega)

    def _step(self, x: np.ndarray, dt: float, normal: np.ndarray) -> np.ndarray:
        """Explicit Euler would let the circles grow by 2 % a turn."""
        dW = self.diffusion() * np.sqrt(dt) * normal
        f = self.drift(x)
        return x + 0.5 * (f + self.drift(x + f * dt + dW)) * dt + dW

    def _loudness(self, x: np.ndarray) -> np.ndarray:
        logits = self.sharpness * x[:, _SIGNAL]
        return np.exp(logits - logits.max())


@dataclass(frozen=True, kw_only=True)
class OrnsteinUhlenbeck:
    """Independent cells, dx = -rate (x - centre) dt + sigma dW, Gaussian at time 0 with `start` and `start_std`.

    All coordinates are alike but for their start; mean and covariance are known at every time.
    """

    start: tuple[float, ...]
    centre: float = 0.0
    rate: float = 1.0  # per time unit
    sigma: float = 0.5  # state units per sqrt(time unit)
    start_std: float = 0.3

    def __post_init__(self):
        at_least("the number of coordinates in start", len(self.start), 1)
        positive("rate", self.rate)
        non_negative("sigma", self.sigma)
        non_negative("start_std", self.start_std)

    def drift(self, x: Float[np.ndarray, "cells dims"]) -> Float[np.ndarray, "cells dims"]:
        return -self.rate * (x - self.centre)

    def mean(self, time: float) -> Float[np.ndarray, " dims"]:
        return self.centre + np.exp(-self.rate * time) * (np.array(self.start) - self.centre)

    def covariance(self, time: float) -> Float[np.ndarray, "dims dims"]:
        decay = np.exp(-2 * self.rate * time)
        variance = decay * self.start_std**2 + self.sigma**2 * (1 - decay) / (2 * self.rate)
        return variance * np.eye(len(self.start))

    def simulate(self, times: Sequence[float], *, seed: int, n_cells: int) -> Snapshots:
        """Exact draws: `n_cells` others at each of `times`."""
        times = increasing("times", times)
        non_negative("the first of times", times[0])
        rng = np.random.default_rng(seed)
        x = [
            self.mean(t) + np.sqrt(self.covariance(t)[0, 0]) * rng.standard_normal((n_cells, len(self.start)))
            for t in times
        ]
        time = np.repeat(times, n_cells)
        return Snapshots(x=np.concatenate(x), time=time, kind=np.full(len(time), "cell"))


@dataclass(frozen=True, kw_only=True)
class GaussianShift:
    """A standard Gaussian that moves with constant velocity: at time t it is N(t velocity, std^2)."""

    velocity: tuple[float, ...]  # state units per time unit
    std: float = 1.0

    def __post_init__(self):
        at_least("the number of coordinates in velocity", len(self.velocity), 1)
        positive("std", self.std)

    def w2(self, t0: float, t1: float) -> float:
        """The 2-Wasserstein distance between two times, which is also W1: every cell moves by the same vector."""
        return float(abs(t1 - t0) * np.linalg.norm(self.velocity))

    def simulate(self, times: Sequence[float], *, seed: int, n_cells: int) -> Snapshots:
        """`n_cells` others at each of `times`."""
        times = increasing("times", times)
        rng = np.random.default_rng(seed)
        time = np.repeat(times, n_cells)
        x = time[:, None] * np.array(self.velocity) + self.std * rng.standard_normal((len(time), len(self.velocity)))
        return Snapshots(x=x, time=time, kind=np.full(len(time), "cell"))


def to_anndata(snapshots: Snapshots) -> AnnData:
    """obsm["latent"] (float32), obs["time"], obs["kind"]; no genes. Read it with
    `DataSpec(expression="obsm/latent", space="latent", time="time", cell_type="kind")`.
    """
    import anndata
    import pandas as pd

    obs = pd.DataFrame(
        {"time": snapshots.time, "kind": pd.Categorical(snapshots.kind)},
        index=[f"cell-{i}" for i in range(len(snapshots.time))],
    )
    return anndata.AnnData(obs=obs, obsm={"latent": snapshots.x.astype(np.float32)})  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbedCells:
    """Cells of several conditions, controls among them.

    Attributes:
        x: float64[cells, genes], in the place of log-normalised expression.
        condition: of each cell, "control", "A" or "A+B".
        genes: their names; the perturbed ones are the first of them.
    """

    x: Float[np.ndarray, "cells genes"]
    condition: np.ndarray
    genes: tuple[str, ...]

    def of(self, condition: str) -> Float[np.ndarray, "n genes"]:
        return self.x[self.condition == condition]

    def to_anndata(self) -> AnnData:
        """X (float32) and obs["perturbation"]. Read it with
        `DataSpec(space="lognormalised", perturbation="perturbation")`.
        """
        import anndata
        import pandas as pd

        obs = pd.DataFrame(
            {"perturbation": pd.Categorical(self.condition)}, index=[f"cell-{i}" for i in range(len(self.x))]
        )
        return anndata.AnnData(self.x.astype(np.float32), obs=obs, var=pd.DataFrame(index=list(self.genes)))


@dataclass(frozen=True, kw_only=True)
class GaussianShifts:
    """Each condition moves one and the same Gaussian by a vector of its own: N(level + shift, covariance).

    Covariance is std^2 correlation^|i - j|. Shifts have random directions and one length; condition i is called after
    gene i. Values lie at least six standard deviations above zero, so that a clip at zero changes nothing.
    """

    n_genes: int = 6
    n_perturbed: int = 4
    level: float = 5.0  # of every gene in controls, expression units
    length: float = 1.5  # of a shift, expression units
    std: float = 0.5
    correlation: float = 0.6  # of neighbouring genes
    seed: int = 0  # of the directions

    def __post_init__(self):
        _check_genes(self.n_genes, self.n_perturbed)
        for name in ("length", "std"):
            positive(name, getattr(self, name))
        if not -1 < self.correlation < 1:
            raise ValueError(f"correlation must lie in (-1, 1); got {self.correlation!r}.")
        _check_level(self.level, self.length, self.std)

    @property
    def genes(self) -> tuple[str, ...]:
        return _gene_names(self.n_genes)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Control first."""
        return ("control", *self.genes[: self.n_perturbed])

    def shift(self, condition: str) -> Float[np.ndarray, " genes"]:
        """What the condition adds to the mean; zero for the control."""
        _check_condition(condition, self.conditions)
        return _sum_of(condition, self.genes, _directions(self.seed, 0, self.n_perturbed, self.n_genes, self.length))

    def mean(self, condition: str) -> Float[np.ndarray, " genes"]:
        return self.level + self.shift(condition)

    def covariance(self, condition: str = "control") -> Float[np.ndarray, "genes genes"]:
        """The same for every condition."""
        _check_condition(condition, self.conditions)
        i = np.arange(self.n_genes)
        return self.std**2 * self.correlation ** np.abs(i[:, None] - i)

    def simulate(self, *, seed: int, n_cells: int, conditions: Sequence[str] | None = None) -> PerturbedCells:
        """`n_cells` of each of `conditions` (None: all); its cells are the same whatever else is drawn."""
        return _simulate(self, seed, n_cells, conditions)


@dataclass(frozen=True, kw_only=True)
class AdditiveEpistasis:
    """Singles have effects, and a double has their sum and what the two do together.

        mean(A+B) = level + effect(A) + effect(B) + interaction(A, B),    covariance = std^2 I

    Attributes:
        epistasis: what an interaction is, all of one length. "none": zero, so that adding up is right. "learnable":
            perturbed genes belong to hidden classes and the interaction is that of the two classes, so that training
            doubles of the same classes tell it. "random": a draw for each pair, which nothing else tells: no method can
            do better than adding up, on average.
        n_classes: gene i is of class i modulo `n_classes`.
    """

    epistasis: Literal["none", "learnable", "random"]
    n_genes: int = 20
    n_perturbed: int = 10  # all their doubles are conditions
    n_classes: int = 2
    level: float = 5.0  # of every gene in controls, expression units
    effect_length: float = 1.0  # expression units
    interaction_length: float = 1.0
    std: float = 0.3
    seed: int = 0  # of effects and interactions; effects are the same for every kind of epistasis

    def __post_init__(self):
        one_of("epistasis", self.epistasis, ("none", "learnable", "random"))
        _check_genes(self.n_genes, self.n_perturbed)
        at_least("n_perturbed", self.n_perturbed, 2)
        at_least("n_classes", self.n_classes, 1)
        for name in ("effect_length", "interaction_length", "std"):
            positive(name, getattr(self, name))
        _check_level(self.level, 2 * self.effect_length + self.interaction_length, self.std)

    @property
    def genes(self) -> tuple[str, ...]:
        return _gene_names(self.n_genes)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Control, singles, doubles."""
        perturbed = self.genes[: self.n_perturbed]
        return ("control", *perturbed, *map("+".join, combinations(perturbed, 2)))

    def classes(self) -> tuple[int, ...]:
        """Of each perturbed gene; hidden from a model."""
        return tuple(i % self.n_classes for i in range(self.n_perturbed))

    def additive(self, condition: str) -> Float[np.ndarray, " genes"]:
        """The mean without interaction: what adding up the singles predicts."""
        _check_condition(condition, self.conditions)
        effects = _directions(self.seed, 0, self.n_perturbed, self.n_genes, self.effect_length)
        return self.level + _sum_of(condition, self.genes, effects)

    def interaction(self, condition: str) -> Float[np.ndarray, " genes"]:
        """Zero for the control and for singles."""
        _check_condition(condition, self.conditions)
        names = condition.split("+")
        if self.epistasis == "none" or len(names) < 2:
            return np.zeros(self.n_genes)
        first, second = map(self.genes.index, names)
        if self.epistasis == "learnable":
            n = self.n_classes
            first, second = sorted((first % n, second % n))
        else:
            n = self.n_perturbed
        return _directions(self.seed, 1, n * n, self.n_genes, self.interaction_length)[first * n + second]

    def mean(self, condition: str) -> Float[np.ndarray, " genes"]:
        return self.additive(condition) + self.interaction(condition)

    def covariance(self, condition: str = "control") -> Float[np.ndarray, "genes genes"]:
        """The same for every condition."""
        _check_condition(condition, self.conditions)
        return self.std**2 * np.eye(self.n_genes)

    def simulate(self, *, seed: int, n_cells: int, conditions: Sequence[str] | None = None) -> PerturbedCells:
        """`n_cells` of each of `conditions` (None: all); its cells are the same whatever else is drawn."""
        return _simulate(self, seed, n_cells, conditions)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellSets:
    """Sets of perturbed cells, each drawn from a population of its own, with control cells that tell nothing of it.

    Attributes:
        x: float64[sets, cells, genes], in the place of log-normalised expression.
        control: as many control cells, of one and the same population in every set.
        hidden: by name, float64[sets]: what made each set's population, unknown to a model.
        genes: their names.
    """

    x: Float[np.ndarray, "sets cells genes"]
    control: Float[np.ndarray, "sets cells genes"]
    hidden: dict[str, Float[np.ndarray, " sets"]]
    genes: tuple[str, ...]

    def to_anndata(self) -> AnnData:
        """X (float32), obs["perturbation"] ("control" or "stimulated") and obs["batch"], one for each set. Read it with
        `DataSpec(space="lognormalised", perturbation="perturbation", batch="batch")`.
        """
        import anndata
        import pandas as pd

        n_sets, n_cells, n_genes = self.x.shape
        x = np.stack([self.control, self.x], axis=1).reshape(-1, n_genes)
        batch = [f"set-{i:04d}" for i in range(n_sets)]
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical(np.tile(np.repeat(("control", "stimulated"), n_cells), n_sets)),
                "batch": pd.Categorical(np.repeat(batch, 2 * n_cells)),
            },
            index=[f"cell-{i}" for i in range(len(x))],
        )
        return anndata.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=list(self.genes)))


@dataclass(frozen=True, kw_only=True)
class VaryingMixtures:
    """A population of populations: in each set another share of the cells responds, and all of the set are shifted.

        cell = level + shift v + responds effect u + std noise,     responds = 1 with probability weight, else 0
        weight ~ Beta(alpha, beta),  shift ~ N(0, shift_std^2),     one draw of each a set, which nothing observed tells

    u and v are orthogonal unit vectors. Controls have neither response nor shift. A prediction that is right on average
    (the mean set, again and again) has none of the spread of set means and weights: `set_mean_covariance` and
    `weight_moments` are what samples of sets must have.
    """

    n_genes: int = 8
    level: float = 5.0  # of every gene in controls, expression units
    effect: float = 2.0  # of a response, expression units
    shift_std: float = 0.25  # of sets, expression units
    std: float = 0.3  # of cells, expression units
    alpha: float = 2.0
    beta: float = 2.0
    seed: int = 0  # of the directions

    def __post_init__(self):
        at_least("n_genes", self.n_genes, 2)
        for name in ("effect", "shift_std", "std", "alpha", "beta"):
            positive(name, getattr(self, name))
        _check_level(self.level, self.effect + 4 * self.shift_std, self.std)

    @property
    def genes(self) -> tuple[str, ...]:
        return _gene_names(self.n_genes)

    def directions(self) -> Float[np.ndarray, "2 genes"]:
        """(u, v): of the response and of the shift."""
        draws = np.random.default_rng([self.seed, 2]).standard_normal((self.n_genes, 2))
        return np.linalg.qr(draws)[0].T

    def weight_moments(self) -> tuple[float, float]:
        """Mean and variance of the share of responding cells, over sets of any size."""
        total = self.alpha + self.beta
        return self.alpha / total, self.alpha * self.beta / (total**2 * (total + 1))

    def mean(self) -> Float[np.ndarray, " genes"]:
        """Of a perturbed cell, over all sets."""
        return self.level + self.weight_moments()[0] * self.effect * self.directions()[0]

    def set_mean_covariance(self, n_cells: int) -> Float[np.ndarray, "genes genes"]:
        """Of the mean of a set of `n_cells`: what differs between populations, and what drawing so few cells adds."""
        at_least("n_cells", n_cells, 1)
        u, v = self.directions()
        mean, variance = self.weight_moments()
        bernoulli = mean - mean**2 - variance  # E w (1 - w)
        along_u = self.effect**2 * (variance + bernoulli / n_cells)
        along_v = self.shift_std**2
        return along_u * np.outer(u, u) + along_v * np.outer(v, v) + self.std**2 / n_cells * np.eye(self.n_genes)

    def weight(self, x: Float[np.ndarray, "*sets cells genes"]) -> Float[np.ndarray, "*sets"]:
        """The share of cells that respond, read off the cells: those beyond half an effect along u."""
        return np.mean((x - self.level) @ self.directions()[0] > self.effect / 2, axis=-1)

    def shift(self, x: Float[np.ndarray, "*sets cells genes"]) -> Float[np.ndarray, "*sets"]:
        """The set's shift, read off the cells: their mean along v."""
        return np.mean((x - self.level) @ self.directions()[1], axis=-1)

    def simulate(self, *, seed: int, n_sets: int, n_cells: int) -> CellSets:
        """`n_sets` sets of `n_cells`; `hidden` holds "weight" and "shift"."""
        at_least("n_sets", n_sets, 1)
        at_least("n_cells", n_cells, 1)
        rng = np.random.default_rng([seed, 3])
        u, v = self.directions()
        weight = rng.beta(self.alpha, self.beta, n_sets)
        shift = self.shift_std * rng.standard_normal(n_sets)
        responds = rng.random((n_sets, n_cells)) < weight[:, None]
        noise = self.std * rng.standard_normal((2, n_sets, n_cells, self.n_genes))
        x = self.level + shift[:, None, None] * v + responds[..., None] * self.effect * u + noise[0]
        return CellSets(x=x, control=self.level + noise[1], hidden={"weight": weight, "shift": shift}, genes=self.genes)


@dataclass(frozen=True, kw_only=True)
class GaussianPopulations:
    """Populations N(m, within_std^2 I) whose mean is drawn for each set: m ~ N(level + shift, between_std^2 I).

    All cells of a set together are one Gaussian vector, so the best guess of a noised set's cells is known: `denoise`.
    """

    n_genes: int = 3
    level: float = 5.0  # of every gene in controls, expression units
    shift: float = 1.0  # of every gene by the perturbation, expression units
    between_std: float = 0.4  # of the means of populations
    within_std: float = 0.3  # of the cells around their population's mean

    def __post_init__(self):
        at_least("n_genes", self.n_genes, 1)
        non_negative("shift", self.shift)
        for name in ("between_std", "within_std"):
            positive(name, getattr(self, name))
        _check_level(self.level, 4 * self.between_std, self.within_std)

    @property
    def genes(self) -> tuple[str, ...]:
        return _gene_names(self.n_genes)

    def simulate(self, *, seed: int, n_sets: int, n_cells: int) -> CellSets:
        """`n_sets` sets of `n_cells`; `hidden` holds "mean", the average of the population's mean over genes."""
        at_least("n_sets", n_sets, 1)
        at_least("n_cells", n_cells, 1)
        rng = np.random.default_rng([seed, 4])
        mean = self.level + self.shift + self.between_std * rng.standard_normal((n_sets, 1, self.n_genes))
        noise = self.within_std * rng.standard_normal((2, n_sets, n_cells, self.n_genes))
        control = self.level + noise[1]
        return CellSets(x=mean + noise[0], control=control, hidden={"mean": mean.mean((1, 2))}, genes=self.genes)

    def denoise(
        self, x_t: Float[np.ndarray, "*sets cells genes"], alpha_bar: float, *, shared: float = 0.0
    ) -> Float[np.ndarray, "*sets cells genes"]:
        """E[x_0 | x_t] of sets x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, from all cells of each set.

        The mean of n cells varies by within^2 / n + between^2 and its noise by shared + (1 - shared) / n; a cell's
        departure from it varies by within^2, and its noise by 1 - shared. Each is shrunk by its own ratio.

        Args:
            alpha_bar: in (0, 1].
            shared: the correlation of the noise of two cells of a set.
        """
        n = x_t.shape[-2]
        within = self.within_std**2

        def shrink(signal: float, noise: float) -> float:
            return np.sqrt(alpha_bar) * signal / (alpha_bar * signal + (1 - alpha_bar) * noise)

        centre = self.level + self.shift
        mean = x_t.mean(axis=-2, keepdims=True)
        of_mean = shrink(within / n + self.between_std**2, shared + (1 - shared) / n)
        return centre + of_mean * (mean - np.sqrt(alpha_bar) * centre) + shrink(within, 1 - shared) * (x_t - mean)


def _simulate(
    world: GaussianShifts | AdditiveEpistasis, seed: int, n_cells: int, conditions: Sequence[str] | None
) -> PerturbedCells:
    at_least("n_cells", n_cells, 1)
    conditions = world.conditions if conditions is None else tuple(conditions)
    x = []
    for condition in conditions:
        mean, root = world.mean(condition), np.linalg.cholesky(world.covariance(condition))
        rng = np.random.default_rng([seed, world.conditions.index(condition)])
        x.append(mean + rng.standard_normal((n_cells, world.n_genes)) @ root.T)
    return PerturbedCells(x=np.concatenate(x), condition=np.repeat(conditions, n_cells), genes=world.genes)


def _directions(seed: int, stream: int, n: int, n_genes: int, length: float) -> np.ndarray:
    x = np.random.default_rng([seed, stream]).standard_normal((n, n_genes))
    return length * x / np.linalg.norm(x, axis=1, keepdims=True)


def _sum_of(condition: str, genes: tuple[str, ...], effects: np.ndarray) -> np.ndarray:
    names = () if condition == "control" else condition.split("+")
    return sum((effects[genes.index(name)] for name in names), np.zeros(len(genes)))


def _gene_names(n_genes: int) -> tuple[str, ...]:
    width = len(str(n_genes - 1))
    return tuple(f"g{i:0{width}d}" for i in range(n_genes))


def _check_genes(n_genes: int, n_perturbed: int) -> None:
    at_least("n_perturbed", n_perturbed, 1)
    at_least("n_genes", n_genes, n_perturbed)


def _check_level(level: float, lowest: float, std: float) -> None:
    if not level - lowest >= 6 * std:
        raise ValueError(
            f"level must be at least {lowest + 6 * std:g}, so that no cell comes near zero: the largest shift plus six "
            f"standard deviations; got {level!r}."
        )


def _check_condition(condition: str, conditions: tuple[str, ...]) -> None:
    if condition not in conditions:
        raise ValueError(
            f"condition must be one of this world's {len(conditions)}, 'control', 'A' or 'A+B' in the order of the "
            f"genes; got {condition!r}.{suggestion(condition, conditions)}"
        )
