"""A prediction some cells at a time: put together as an AnnData, or written to a file as it is made."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scjax.data.spec import AnnData
from scjax.data.writer import as_written, writing_cells

__all__ = ["Part", "Prediction"]


class Part(NamedTuple):
    """The next cells of a prediction, arrays float32[cells, ...] and a row of obs each."""

    x: np.ndarray
    obs: Any
    obsm: Mapping[str, np.ndarray] = {}
    layers: Mapping[str, np.ndarray] = {}


class Written(NamedTuple):
    """What a file of predictions holds."""

    n_obs: int
    n_vars: int
    uns: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Cells that are made when they are asked for; all that can be refused was refused before.

    Attributes:
        n_cells: of all parts together.
        genes: names of the columns.
        parts: makes the cells, in order.
        uns: the entries that go with them.
        obsm: the widths of what each part has in obsm, by name.
        layers: the names of what each part has in layers.
        tables: further entries of obsm, of all cells.
        graphs: entries of obsp, of all cells; sparse matrices.
        categories: columns of words in obs become categories, which are known when all cells are made. Files have them
            anyway.
    """

    n_cells: int
    genes: tuple[str, ...]
    parts: Callable[[], Iterator[Part]]
    uns: Mapping[str, Any]
    obsm: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    tables: Mapping[str, Any] = field(default_factory=dict)
    graphs: Mapping[str, Any] = field(default_factory=dict)
    categories: bool = False

    def then(self, other: "Prediction") -> "Prediction":
        """These cells and then those of `other`, which has the same genes; what goes with them is that of these. A
        column of obs that one of the two lacks has no values for its cells.
        """
        if self.genes != other.genes or self.obsm != other.obsm or self.layers != other.layers:
            raise ValueError("predictions are joined where their genes, obsm and layers are the same; these differ.")
        if self.tables or self.graphs or other.tables or other.graphs:
            raise ValueError("tables and graphs are of all cells of a prediction; two that have any cannot be joined.")
        both = (self.parts, other.parts)
        parts = lambda: itertools.chain.from_iterable(make() for make in both)  # noqa: E731
        return replace(self, n_cells=self.n_cells + other.n_cells, parts=parts)

    def in_memory(self) -> AnnData:
        import anndata
        import pandas as pd

        parts = list(self.parts())
        obs = pd.concat([part.obs for part in parts])
        made = anndata.AnnData(
            X=np.concatenate([part.x for part in parts]),
            obs=as_written(obs) if self.categories else obs,
            var=pd.DataFrame(index=list(self.genes)),
            layers={name: np.concatenate([part.layers[name] for part in parts]) for name in self.layers},
            uns=dict(self.uns),
            obsp=dict(self.graphs),
        )
        for name, table in self.tables.items():
            made.obsm[name] = table
        for name in self.obsm:
            made.obsm[name] = np.concatenate([part.obsm[name] for part in parts])
        return made

    def write(self, path: str | Path) -> Written:
        """To .h5ad or .zarr, as `in_memory` would be written, one part in memory at a time.

        Raises:
            ValueError: another suffix, something that is there already, a folder that is not.
            OSError: no room, no permission; nothing is left then.
        """
        with writing_cells(path, self.n_cells, self.genes, obsm=self.obsm, layers=self.layers) as cells:
            cells.uns, cells.tables, cells.graphs = dict(self.uns), dict(self.tables), dict(self.graphs)
            for part in self.parts():
                cells.add(part.x, part.obs, obsm=part.obsm, layers=part.layers)
        return Written(self.n_cells, len(self.genes), self.uns)
