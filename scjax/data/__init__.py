"""Files to batches; for a time series it is these steps, one module each:

    adata = read_anndata("cells.h5ad")                                 source: or .zarr; or datasets.klein2015()
    spec = DataSpec(space="counts", time="day", cell_type="state")     spec: what the keys mean; spec.check(adata)
    rule = HoldOutTimes(times=(4.0,))                                  splits: what training never sees
    steps = Preprocess(n_top_genes=2000, n_components=50)              preprocess: fitted on training cells only
    data = prepare_time_series(adata, spec, rule, steps)               timeseries: every cell in the model's space
    batch_at = make_batches(data, TimeSeriesSampling(), seed=0)        sampling, collate: batch n of (seed, n) alone
    for chunk in prefetch(batch_at, 0, 1000, chunk=10): ...            device: stacked batches, made ahead, in order

and for perturbation data these:

    spec = DataSpec(space="lognormalised", perturbation="condition")   spec: A+B, A+ctrl, ctrl; conditions: their names
    rule = HoldOutSeenDoubles()                                        splits: populations, not cells
    steps = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
    data = prepare_perturbation(adata, spec, rule, steps, GraphRule()) perturbation: cells, vocabulary, graph of genes
    batch_at = make_paired_batches(data, PairedSampling(), seed=0)     controls and perturbed cells of one population

and for sets of cells these:

    data = [("pbmc", adata), ("tahoe", other)]                         source: several files as one, genes by name
    spec = DataSpec(space="lognormalised", perturbation="drug", cell_type="line", batch="donor",
                    covariates=("line", "donor"))                      spec: controls are matched within covariates
    rule = HoldOutCrossed(covariates=("donor",), values=(("D1",),), conditions=("A", "B"))
    data = prepare_cell_sets(data, spec, rule, steps, absent="zero")   cellsets: ids of covariates, pools of controls
    batch_at = make_cell_set_batches(data, CellSetSampling(), seed=0)  sets of one group, a control for each cell

and where the cells do not fit into memory these:

    adata = read_anndata(["a.zarr", "b.h5ad"], backed=True)            disk: matrices stay there, rows are read in parts
    data = prepare_time_series(adata, ..., store="cells/")             store: the model's space on disk; batches from it

Models see the batches; AnnData stays here. `synthetic` makes populations whose answers are known.
"""
