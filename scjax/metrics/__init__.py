"""What a prediction is worth: distances to the real cells, baselines without training, interaction statistics, tables."""
