"""The device mesh and how parameters and batches are laid out on it."""

from ._mesh import batch_sharding as batch_sharding
from ._mesh import make_mesh as make_mesh
from ._sharding import ShardingRules as ShardingRules
from ._sharding import param_shardings as param_shardings
