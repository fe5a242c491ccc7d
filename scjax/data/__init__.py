"""Files to batches, for a time series:

    adata   = source.read_anndata("cells.h5ad")                             a file, or datasets.klein2015()
    spec    = DataSpec(expression="X", space="counts", time="day")          what each key means; spec.check(adata)
    rule    = splits.HoldOutTimes(times=(4.0,))                             which times training never sees
    data    = timeseries.prepare_time_series(adata, spec, rule, Preprocess(n_components=50))   fitted on training cells
    batch_at = collate.make_batches(data, TimeSeriesSampling(n_cells=512), seed=0)       batch_at(n): of (seed, n) only
    chunks  = device.prefetch(batch_at, 0, 1000, chunk=10)                  stacked batches, made ahead, in order

Models see batches only; AnnData stays here. `synthetic` makes populations whose answers are known.
"""
