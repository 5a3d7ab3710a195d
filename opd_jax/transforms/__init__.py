"""Optax transforms that watch and use the subspace into which updates concentrate (arXiv 2605.11739)."""

from opd_jax.transforms import extrapolation as extrapolation
from opd_jax.transforms import spectrum as spectrum
from opd_jax.transforms._allocate import AllocateState as AllocateState
from opd_jax.transforms._allocate import allocate_modules as allocate_modules
from opd_jax.transforms._allocate import module_matrices as module_matrices
from opd_jax.transforms._extrapolate import ExtrapolateState as ExtrapolateState
from opd_jax.transforms._extrapolate import extrapolate as extrapolate
from opd_jax.transforms._matrices import MatrixAxes as MatrixAxes
from opd_jax.transforms._matrices import all_matrices as all_matrices
from opd_jax.transforms._matrices import block_matrices as block_matrices
from opd_jax.transforms._module_report import frozen_modules as frozen_modules
from opd_jax.transforms._module_report import module_report as module_report
from opd_jax.transforms._project import ProjectState as ProjectState
from opd_jax.transforms._project import project_to_subspace as project_to_subspace
from opd_jax.transforms._rank1 import predict_rank1 as predict_rank1
from opd_jax.transforms._subspace_summary import subspace_summary as subspace_summary
from opd_jax.transforms._track import Probe as Probe
from opd_jax.transforms._track import TrackSubspaceState as TrackSubspaceState
from opd_jax.transforms._track import track_subspace as track_subspace
