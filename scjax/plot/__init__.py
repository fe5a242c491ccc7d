"""Figures: arrays or tables in, matplotlib Axes out; a figure is made where no `ax` is given, no style is set."""
