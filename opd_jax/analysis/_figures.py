"""All figures of a result, in the order of the report."""

from opd_jax.analysis import _figures_compare as compared
from opd_jax.analysis import _figures_geometry as shapes
from opd_jax.analysis import _figures_trajectory as ways
from opd_jax.analysis._figure import Figure
from opd_jax.analysis._result import Result

SECTIONS = {
    "findings": "What matters",
    "table1": "Concentration of the updates",
    "norms": "Norms along the way",
    "layers": "Layers: attention and MLP",
    "spectra": "Spectra and captured energy",
    "alignment": "Alignment of subspaces",
    "paths": "The way of the first direction",
    "settled": "Lock-in",
    "comparison": "Runs side by side",
    "interventions": "Interventions",
    "notes": "What was not compared",
}
"""Sections of the report by the name that figures give, in its order."""

SHORT = {
    "findings": "What matters",
    "table1": "Concentration",
    "norms": "Norms",
    "layers": "Layers",
    "spectra": "Spectra",
    "alignment": "Alignment",
    "paths": "First direction",
    "settled": "Lock-in",
    "comparison": "Comparison",
    "interventions": "Interventions",
    "notes": "Notes",
}
"""The same in a word or two, for the navigation."""


def figures(result: Result) -> tuple[Figure, ...]:
    """The figures of the report, those of the findings first, then the paper's in its order.

    What cannot be drawn is left out: ways need two checkpoints, scores must be known, t-SNE needs
    scikit-learn and four checkpoints, differences two runs.

    Args:
        result: of `analyze`, or read back from result.json.

    Example:
        >>> import numpy as np
        >>> from opd_jax import analysis
        >>> tree = lambda x: {"layers": {"0": {"up": np.diag([x, 1.0, 1.0])}}}
        >>> result = analysis.analyze(tree(0), {"a": [tree(1), tree(3)]}, steps={"a": [10, 20]}, cache=None)
        >>> [figure.name for figure in figures(result)][:3]
        ['concentration', 'lock_in', 'layers']

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    runs = result.runs
    found = [
        shapes.concentration(runs),
        ways.lock_in(runs),
        shapes.depth(runs),
        shapes.modules(runs),
        ways.direction_distance(runs),
        *shapes.measures(runs),
        *shapes.norms(runs),
        shapes.places(runs),
        *shapes.spectra(runs),
        *ways.alignment(runs),
        *ways.paths(runs),
        *ways.settled(runs),
        *compared.comparison(result),
        *compared.interventions(result),
    ]
    return tuple(figure for figure in found if figure is not None)
