"""The small real data sets that ship with the package."""

from importlib import resources

import numpy as np

from scjax.data.source import read_anndata
from scjax.data.spec import AnnData

__all__ = ["klein2015", "mcfaline2023", "norman2019"]


def klein2015() -> AnnData:
    """Mouse embryonic stem cells after LIF withdrawal: 1000 cells x 900 genes, days 0, 2, 4 and 7 (inDrop).

    `X` holds UMI counts (int32, dense: four of five are not zero), `obs["time"]` the day, `uns["source"]` citation and
    licence. It is a subset of the study: 1000 of 2717 cells, the 900 most abundant genes.

    Reference: Klein et al., Cell 161 (2015), doi 10.1016/j.cell.2015.04.044; GEO GSE65525.
    """
    adata = _read("klein2015.h5ad")
    adata.X = adata.X.astype("int32")  # the file has int16, in which a user's sums would overflow
    return adata


def mcfaline2023() -> AnnData:
    """Three glioblastoma lines under CRISPR interference of nine kinases and receptors, and control (sci-Plex-GxE).

    2586 cells x 500 genes, 46 to 100 cells of each perturbation in each line. `X` is sparse float32: log(1 + counts per
    10,000 of the cell's total over the full transcriptome), which is `obs["total_counts"]`; `layers["counts"]` has the
    UMI counts (int32). `obs["perturbation"]` is `control` or a gene, `obs["cell_type"]` the line (A172, T98G, U87MG),
    `uns["source"]` citation and licence. It is a subset of the study, its untreated arm. On these genes the effects are
    weak: it shows that code works across lines and that a model invents no effect, and ranks no models.

    Reference: McFaline-Figueroa et al., Cell Genomics 4 (2024), doi 10.1016/j.xgen.2023.100487; GEO GSE225775.
    """
    return _normalised("mcfaline2023.h5ad")


def norman2019() -> AnnData:
    """K562 cells under CRISPR activation: control, 18 single genes and 15 pairs, up to 100 cells each (10x Genomics).

    3375 cells x 500 genes, of which 250 are expressed at all and 120 in ten or more cells (`var["n_cells"]`). `X` is
    sparse float32: log(1 + counts per 10,000 of the cell's total over the full transcriptome), which is
    `obs["total_counts"]`; `layers["counts"]` holds the UMI counts (int32), whose sums over these few genes tell no
    cell's depth. `obs["perturbation"]` is `control`, `A` or `A+B`, `uns["source"]` citation and licence. It is a subset
    of the study; TMSB4X is the only perturbed gene that is among the 500.

    Reference: Norman et al., Science 365 (2019), doi 10.1126/science.aax4438; GEO GSE133344.
    """
    return _normalised("norman2019.h5ad")


def _normalised(name: str) -> AnnData:
    """Counts in the file; log-normalised by the totals of all genes of the study, the counts as a layer."""
    adata = _read(name)
    counts = adata.X.astype("int32")
    totals = np.repeat(adata.obs["total_counts"].to_numpy(), np.diff(counts.indptr))
    x = counts.astype("float32")
    x.data = np.log1p(counts.data / totals * 1e4).astype("float32")
    adata.X, adata.layers["counts"] = x, counts
    return adata


def _read(name: str) -> AnnData:
    with resources.as_file(resources.files("scjax.data") / "files" / name) as path:
        return read_anndata(path)
