"""Published figures of chips, their topologies, and the least time that a program takes on them."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Chip:
    """One chip, or one of its cores where the compiler counts them singly.

    Attributes:
        name: as in topology names.
        kinds: what JAX calls its devices.
        flops: bfloat16 FLOP/s.
        memory: GiB.
        usable: GiB that XLA leaves a program of them, read off its error message.
        bandwidth: bytes/s of the main memory.
        links: bytes/s that leave the chip over all its links to other chips.
        cores: devices of a chip; the figures are those of one.
        source: where the figures are published.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    usable: float
    bandwidth: float
    links: float
    cores: int
    source: str


# ICI: the figure for one direction; newer pages give the sum of both. "16 GB" and the like are GiB there.
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12 / 2, 16, 15.25, 1200e9 / 2, 300e9 / 2, 2,
         "https://arxiv.org/abs/2304.01433 (Table 4), https://cloud.google.com/tpu/docs/v4"),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16, 15.75, 819e9, 200e9, 1,
         "https://cloud.google.com/tpu/docs/v5e"),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95, 95.74, 2765e9, 600e9, 1,
         "https://cloud.google.com/tpu/docs/v5p"),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32, 31.25, 1600e9, 400e9, 1,
         "https://cloud.google.com/tpu/docs/v6e"),
    # Usable: with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 (JAX's own is 0.75). Links: NVLink, one direction.
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 79.6, 73.2, 3350e9, 450e9, 1,
         "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"),
)  # fmt: skip
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "h100": ("1", "2", "4", "8"),
}


class StandIns(tuple):
    """Virtual CPU devices in the place of GPUs, which no compiler here compiles for.

    Attributes:
        chip: what they stand for.
    """

    chip: Chip


def chip_of(device: Any) -> Chip | None:
    """The figures of a JAX device; None if none are known."""
    return next((chip for chip in CHIPS if device.device_kind in chip.kinds), None)


def topology(name: str) -> Sequence[Any]:
    """Devices that need not be there: of a TPU slice, to compile for, or `StandIns` for GPUs.

    Args:
        name: such as "v5e:4x4" or "v5p:4x4x4", in chips, or "h100:8".

    Raises:
        ValueError: on a name that is not known, or if there are too few virtual devices for GPUs.
        ImportError: without libtpu, whose compiler this is.
    """
    known = "; ".join(f"{chip}: {', '.join(sizes)}" for chip, sizes in TOPOLOGIES.items())
    found = re.fullmatch(r"([vh]\d+[a-z]*):(\d+(?:x\d+)*)", name)
    if found is None or found[2] not in TOPOLOGIES.get(found[1], ()):
        raise ValueError(
            f"no topology {name!r}; a name is CHIP:SIZE in chips, such as v5e:4x4. Known: {known}"
        )
    if found[1] == "h100":
        return _stand_ins(found[1], int(found[2]))
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for {name} needs libtpu, though no TPU; it comes with `pip install 'opd_jax[tpu]'`"
        )
    if jax.default_backend() != "tpu":  # nobody answers questions about the machine, or locks it
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    chips = math.prod(int(size) for size in found[2].split("x"))
    chips *= next(chip.cores for chip in CHIPS if chip.name == found[1])
    if len(devices) != chips:
        raise ValueError(f"libtpu makes {len(devices)} devices of {name}, not {chips}: that is not planned")
    return devices


def _stand_ins(name: str, count: int) -> StandIns:
    with contextlib.suppress(RuntimeError):  # too late: the backend has started
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{name}:{count} needs {count} virtual CPU devices, and JAX has started with {len(devices)}"
        )
    found = StandIns(devices[:count])
    found.chip = next(chip for chip in CHIPS if chip.name == name)
    return found


def bound(chip: Chip, flops: float, moved: float, sent: float) -> dict[str, float]:
    """Seconds that a program takes at least: of its FLOPs, its memory traffic and what it sends.

    Nothing is faster than the largest; a real program is slower, as they overlap in part only.

    Example:
        >>> bound(CHIPS[1], 197e12, 819e9 / 2, 0.0)
        {'compute': 1.0, 'memory': 0.5, 'links': 0.0}
    """
    return dict(compute=flops / chip.flops, memory=moved / chip.bandwidth, links=sent / chip.links)
