"""The device mesh and how parameters and batches are laid out on it."""

from opd_jax.parallel._chips import CHIPS as CHIPS
from opd_jax.parallel._chips import Chip as Chip
from opd_jax.parallel._chips import topology as topology
from opd_jax.parallel._mesh import ROWS as ROWS
from opd_jax.parallel._mesh import batch_sharding as batch_sharding
from opd_jax.parallel._mesh import constrain as constrain
from opd_jax.parallel._mesh import make_mesh as make_mesh
from opd_jax.parallel._mesh import row_shards as row_shards
from opd_jax.parallel._platform import compiling_for as compiling_for
from opd_jax.parallel._platform import platform as platform
from opd_jax.parallel._sharding import ShardingRules as ShardingRules
from opd_jax.parallel._sharding import param_shardings as param_shardings
