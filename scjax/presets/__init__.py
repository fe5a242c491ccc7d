"""Named experiments: of the papers, and those that the demo runs. One module a model."""

from dataclasses import dataclass

from scjax.check import one_of
from scjax.experiment import Experiment

__all__ = ["Preset", "names", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An experiment and what a user wants to know before starting it.

    Attributes:
        summary: the data, and where they are published.
        command: that trains it; the data file is the user's where the package does not ship it.
        cost: measured, or estimated from a measured step.
        expected: the score to expect and where it was read, or why there is none.
        source: of the settings.
    """

    summary: str
    experiment: Experiment
    command: str
    cost: str
    expected: str
    source: str


def names() -> tuple[str, ...]:
    return tuple(_all())


def preset(name: str) -> Preset:
    """The preset of this name; ValueError, with the nearest one, for an unknown name."""
    one_of("preset", name, names())
    return _all()[name]


def _all() -> dict[str, Preset]:
    from scjax.presets import perturbdiff, scdfm, scimf

    of_model = {"scimf": scimf.PRESETS, "scdfm": scdfm.PRESETS, "perturbdiff": perturbdiff.PRESETS}
    return {f"{model}/{name}": found for model, presets in of_model.items() for name, found in presets.items()}
