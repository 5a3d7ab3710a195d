"""A teacher on devices of its own: tokens go there, hidden states come back."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.config import Config
from opd_jax.models._protocol import hidden_states, unembed
from opd_jax.parallel import batch_sharding, make_mesh, param_shardings
from opd_jax.training._step import Batch


def split_devices(config: Config, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
    """(mesh of the student, mesh of the teacher): by `teacher.mesh` the last devices are the teacher's.

    Raises:
        ValueError: if the sizes do not add up to the devices, if rows do not spread evenly over those of the
            teacher, or with several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config.teacher.mesh)
    asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
    count, total = math.prod(sizes.values()), len(devices)
    if jax.process_count() > 1:
        raise ValueError(
            f"teacher.mesh works in one process, but there are {jax.process_count()}; leave it out: the "
            "teacher then shares the student's mesh"
        )
    if count >= total:
        raise ValueError(
            f"teacher.mesh {asked} takes {count} of {total} devices, which leaves none to the student"
        )
    try:
        student = make_mesh(**dataclasses.asdict(config.mesh), devices=devices[: total - count])
    except ValueError as error:
        raise ValueError(f"{error} (teacher.mesh {asked} takes {count} of {total} devices)") from None
    rows, spread = config.batch_size // config.micro_batches, sizes["data"] * sizes["fsdp"]
    if rows % spread:
        raise ValueError(
            f"batch_size / micro_batches is {rows}: so many rows do not spread evenly over teacher.mesh.data "
            f"x teacher.mesh.fsdp = {spread} devices; make it a multiple of {spread}"
        )
    return student, make_mesh(**sizes, devices=devices[total - count :])


class ApartTeacher:
    """A teacher on a mesh of its own.

    Attributes:
        mesh: the teacher's.
        params: all of its parameters, there.
        head: what its `unembed` needs of them, on the student's mesh; all others are empty.
    """

    def __init__(self, teacher: nnx.Module, student_mesh: Mesh):
        graphdef, self.params = nnx.split(teacher)
        self.mesh = jax.tree.leaves(self.params)[0].sharding.mesh
        self._rows = batch_sharding(student_mesh)
        self.head = _head(graphdef, self.params, student_mesh)

    def score(self, score: Callable[..., jax.Array], batch: Batch) -> jax.Array:
        """`score` (from `make_score`) on the teacher's devices; its result on the student's."""
        seen = {
            name: getattr(batch, name)
            for name in (
                "prompts",
                "prompt_lengths",
                "completions",
                "teacher_prompts",
                "teacher_prompt_lengths",
            )
        }
        with jax.set_mesh(self.mesh):  # activations are laid out on it
            there = jax.device_put(Batch(**seen, mask=None), batch_sharding(self.mesh))
            hidden = score(self.params, there)
        return jax.device_put(hidden, self._rows)


def _head(graphdef: nnx.GraphDef, params: Any, mesh: Mesh) -> Any:
    """The parameters with those that `unembed` uses copied to the mesh, and no elements in all others."""
    leaves, treedef = jax.tree.flatten(params)
    used, places = _used_by_unembed(graphdef, params), jax.tree.leaves(param_shardings(params, mesh))
    empty = NamedSharding(mesh, P())
    kept = [
        jax.device_put(leaf, place) if use else jnp.zeros(0, leaf.dtype, device=empty)
        for leaf, use, place in zip(leaves, used, places, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept)


def _used_by_unembed(graphdef: nnx.GraphDef, params: Any) -> list[bool]:
    """Which leaves of the parameters `unembed` reads, found by tracing it: the model may be a user's own."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params))

    def model(leaves):
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

    token = jnp.zeros((1, 1), jnp.int32)
    hidden = jax.eval_shape(lambda leaves: hidden_states(model(leaves), token)[0], leaves)
    jaxpr = jax.make_jaxpr(lambda leaves, hidden: unembed(model(leaves), hidden))(leaves, hidden).jaxpr
    read = {id(each) for equation in jaxpr.eqns for each in equation.invars}
    read |= {id(each) for each in jaxpr.outvars}
    return [id(each) in read for each in jaxpr.invars[: len(leaves)]]
