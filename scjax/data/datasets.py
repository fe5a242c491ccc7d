"""The small real data sets that ship with the package."""

from importlib import resources

from scjax.data.source import read_anndata
from scjax.data.spec import AnnData

__all__ = ["klein2015"]


def klein2015() -> AnnData:
    """Mouse embryonic stem cells after LIF withdrawal: 1000 cells x 900 genes, days 0, 2, 4 and 7 (inDrop).

    `X` holds UMI counts (int32, dense: four of five are not zero), `obs["time"]` the day, `uns["source"]` citation and
    licence. It is a subset of the study: 1000 of 2717 cells, the 900 most abundant genes.

    Reference: Klein et al., Cell 161 (2015), doi 10.1016/j.cell.2015.04.044; GEO GSE65525.
    """
    with resources.as_file(resources.files("scjax.data") / "files" / "klein2015.h5ad") as path:
        adata = read_anndata(path)
    adata.X = adata.X.astype("int32")  # the file has int16, in which a user's sums would overflow
    return adata
