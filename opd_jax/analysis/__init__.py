"""What training did to the weights: the updates W - W_base of checkpoints of any run (arXiv 2605.11739)."""

from opd_jax.analysis._cache import Cache as Cache
from opd_jax.analysis._checkpoints import Checkpoint as Checkpoint
from opd_jax.analysis._checkpoints import open_checkpoint as open_checkpoint
from opd_jax.analysis._compare import bootstrap as bootstrap
from opd_jax.analysis._compare import compare as compare
from opd_jax.analysis._figure import Figure as Figure
from opd_jax.analysis._figures import figures as figures
from opd_jax.analysis._geometry import FRACTIONS as FRACTIONS
from opd_jax.analysis._geometry import Geometry as Geometry
from opd_jax.analysis._geometry import MatrixGeometry as MatrixGeometry
from opd_jax.analysis._geometry import geometry as geometry
from opd_jax.analysis._images import write_report as write_report
from opd_jax.analysis._pool import Bar as Bar
from opd_jax.analysis._report import report as report
from opd_jax.analysis._result import Result as Result
from opd_jax.analysis._result import Run as Run
from opd_jax.analysis._run import analyze as analyze
from opd_jax.analysis._run import with_scores as with_scores
from opd_jax.analysis._spectra import singular_values as singular_values
from opd_jax.analysis._trajectory import MatrixTrajectory as MatrixTrajectory
from opd_jax.analysis._trajectory import Trajectory as Trajectory
from opd_jax.analysis._trajectory import trajectory as trajectory
