"""The device mesh, how parameters and batches are laid out on it, and many processes that share one."""

from opd_jax.parallel._chips import CHIPS as CHIPS
from opd_jax.parallel._chips import Chip as Chip
from opd_jax.parallel._chips import topology as topology
from opd_jax.parallel._hosts import any_of as any_of
from opd_jax.parallel._hosts import anybody as anybody
from opd_jax.parallel._hosts import first_then_others as first_then_others
from opd_jax.parallel._hosts import is_first as is_first
from opd_jax.parallel._hosts import leave as leave
from opd_jax.parallel._hosts import of_first as of_first
from opd_jax.parallel._hosts import place as place
from opd_jax.parallel._hosts import same_everywhere as same_everywhere
from opd_jax.parallel._hosts import several as several
from opd_jax.parallel._hosts import shared as shared
from opd_jax.parallel._hosts import start as start
from opd_jax.parallel._hosts import to_host as to_host
from opd_jax.parallel._hosts import together as together
from opd_jax.parallel._mesh import ROWS as ROWS
from opd_jax.parallel._mesh import batch_sharding as batch_sharding
from opd_jax.parallel._mesh import constrain as constrain
from opd_jax.parallel._mesh import make_mesh as make_mesh
from opd_jax.parallel._mesh import nearest as nearest
from opd_jax.parallel._mesh import row_shards as row_shards
from opd_jax.parallel._platform import compiling_for as compiling_for
from opd_jax.parallel._platform import platform as platform
from opd_jax.parallel._sharding import ShardingRules as ShardingRules
from opd_jax.parallel._sharding import param_shardings as param_shardings
