"""The numbers that genes and perturbations go by inside a model."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int

from scjax.check import at_least, one_of, suggestion
from scjax.data.conditions import CONTROL

__all__ = ["SPECIAL_TOKENS", "PerturbationIds", "Vocabulary"]

SPECIAL_TOKENS = ("<pad>", "<cls>", "<mask>", CONTROL)  # ids 0 to 3, as in the scDFM code
PerturbationIds: TypeAlias = Literal["gene", "table"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Names by their number; hashable, and JSON through `scjax.config`.

    Attributes:
        tokens: `SPECIAL_TOKENS`, then the kept genes in code-point order, as in the scDFM code; then, and this is ours,
            the perturbed names that are not among the kept genes, in code-point order. The code has no number for them.
        perturbations: every name that occurs in a perturbation, and "control", in code-point order.
    """

    tokens: tuple[str, ...]
    perturbations: tuple[str, ...]

    def __post_init__(self):
        if self.tokens[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise ValueError(f"tokens must begin with {', '.join(SPECIAL_TOKENS)}; got {self.tokens[:4]}.")
        for field in ("tokens", "perturbations"):
            repeated = [name for name, n in Counter(getattr(self, field)).items() if n > 1]
            if repeated:
                raise ValueError(f"{field} must be unique; {repeated[0]!r} is repeated.")
        if CONTROL not in self.perturbations:
            raise ValueError(f"perturbations must hold {CONTROL!r}; got {', '.join(self.perturbations[:5])}.")

    @classmethod
    def of(cls, genes: Iterable[str], perturbed_names: Iterable[str]) -> "Vocabulary":
        """The vocabulary of these kept genes and of all names that occur in perturbations, held-out ones included.

        Raises:
            ValueError: a gene twice, or a name that is one of `SPECIAL_TOKENS` (but a perturbed name "control").
        """
        genes, names = sorted(genes), sorted({*perturbed_names, CONTROL})
        taken = sorted({*genes, *(set(names) - {CONTROL})} & set(SPECIAL_TOKENS))
        if taken:
            raise ValueError(f"A gene or a perturbation is called {taken[0]!r}, which has a meaning here. Rename it.")
        unmeasured = sorted(set(names) - {*genes, CONTROL})
        return cls(tokens=(*SPECIAL_TOKENS, *genes, *unmeasured), perturbations=tuple(names))

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_perturbations(self) -> int:
        return len(self.perturbations)

    def gene_tokens(self, names: Iterable[str]) -> Int[np.ndarray, " genes"]:
        """The token of each gene, int32.

        Raises:
            ValueError: a name that has no token, or that is no gene.
        """
        names = tuple(names)
        for name in names:
            if name in SPECIAL_TOKENS or name not in self._token_of:
                raise ValueError(
                    f"{name!r} is not among the {self.n_tokens - len(SPECIAL_TOKENS)} genes that the model was fitted "
                    f"on.{suggestion(name, self.tokens[len(SPECIAL_TOKENS) :])}"
                )
        return np.array([self._token_of[name] for name in names], np.int32).reshape(len(names))

    def encode(
        self, perturbations: Sequence[tuple[str, ...]], kind: PerturbationIds, n_slots: int
    ) -> Int[np.ndarray, "n slots"]:
        """The ids of each perturbation, int32: tokens for "gene", places in `perturbations` for "table".

        Names keep their order and may include "control"; free slots at the end hold the control's id. A measured gene
        has a token, whether any cell was perturbed in it or not.

        Raises:
            ValueError: a name that is unknown, or more names than slots.
        """
        one_of("kind", kind, ("gene", "table"))
        at_least("n_slots", n_slots, 1)
        known, what = (self._token_of, "genes") if kind == "gene" else (self._place_of, "perturbations")
        ids = np.full((len(perturbations), n_slots), known[CONTROL], np.int32)
        for row, names in zip(ids, perturbations, strict=True):
            if len(names) > n_slots:
                raise ValueError(
                    f"{'+'.join(names)!r} has {len(names)} parts, there are n_slots={n_slots}. "
                    f"Set n_slots to the size of the largest combination before training."
                )
            for slot, name in enumerate(names):
                if name not in known or (name in SPECIAL_TOKENS and name != CONTROL):
                    names_known = [n for n in known if n not in SPECIAL_TOKENS]
                    raise ValueError(
                        f"{name!r} is not among the {len(names_known)} {what} of the data."
                        f"{suggestion(name, names_known)}"
                    )
                row[slot] = known[name]
        return ids

    @cached_property
    def _token_of(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.tokens)}

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.perturbations)}
