"""What a prediction is worth.

`population` measures distances between clouds of cells, `baselines` predicts without training, `interaction` sums up
who acts on whom, `report` puts models beside baselines and the real-vs-real floor and says which wins.
"""
