"""The device mesh: axes `data`, `fsdp` and `tensor`."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Mesh axes that rows of a batch are spread over."""


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arranges the devices in a mesh with the axes ("data", "fsdp", "tensor").

    Args:
        data: copies of the model, each working on its part of the batch.
        fsdp: devices the weights of one copy are spread over, each working on part of the batch.
        tensor: devices that share the work of each matrix product.
        devices: default: all of them.

    One size may be -1: it takes the devices that the others leave.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.

    Example:
        >>> make_mesh().axis_names
        ('data', 'fsdp', 'tensor')
    """
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    free = [name for name, size in sizes.items() if size == -1]
    bad = {name: size for name, size in sizes.items() if size != -1 and size < 1}
    if bad:
        raise ValueError(f"mesh sizes must be positive, or -1 for the rest; got {bad}")
    if len(free) > 1:
        raise ValueError(f"only one mesh axis can be -1; got {' and '.join(free)}")
    if devices is None:
        devices = jax.devices()
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        if len(devices) % fixed:
            raise ValueError(
                f"{len(devices)} devices cannot be divided by the {fixed} that"
                f" {', '.join(f'{n}={s}' for n, s in sizes.items() if s != -1)} ask for; the nearest that"
                f" works is {_nearest_sizes(sizes, len(devices))}"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        asked = " x ".join(f"{n}={s}" for n, s in sizes.items())
        raise ValueError(
            f"mesh {asked} needs {fixed} devices, but there are {len(devices)}; fsdp=-1 takes what the others"
            " leave"
        )
    shape = tuple(sizes.values())
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types, devices=devices)


def _nearest_sizes(sizes: dict[str, int], count: int) -> str:
    """Sizes that divide `count`, each as near as can be after those before it."""
    found = []
    for name, size in sizes.items():
        if size != -1:
            found.append(f"{name}={nearest(count, size)}")
            count //= nearest(count, size)
    return ", ".join(found)


def nearest(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted`, the smaller of two.

    Example:
        >>> nearest(32, 6), nearest(151936, 3)
        (4, 2)
    """
    divisors = (d for d in range(1, size + 1) if size % d == 0)
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Lays `x` out as `P(*spec)` on the mesh that `jax.set_mesh` has set; without one, `x` itself.

    Left to itself XLA may spread activations over the width of the weights instead of over rows, and
    keep whole copies of a cache. A dimension that its mesh axes do not divide is left to XLA, and so is
    all of `x` on a mesh with other axes, or whose axes are not Auto.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    fitted = []
    for size, names in zip(x.shape, spec, strict=False):
        names = (names,) if isinstance(names, str) else names
        if names is not None:
            split = math.prod(mesh.shape.get(name, 0) for name in names)
            names = names if split and size % split == 0 else P.UNCONSTRAINED
        fitted.append(names)
    if not any(isinstance(names, tuple) for names in fitted):
        return x
    return jax.lax.with_sharding_constraint(x, P(*fitted))


def row_shards(mesh: Mesh | None = None) -> int:
    """Parts that the rows of a batch are in on a mesh; None: that of `jax.set_mesh`, and without one, 1."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape.get(name, 1) for name in ROWS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, P(ROWS))
