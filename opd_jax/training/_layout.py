"""Whether rows and models can be split over the mesh."""

from collections.abc import Iterator

from jax.sharding import Mesh

from opd_jax import models
from opd_jax.config import Config
from opd_jax.parallel import nearest


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raises ValueError if the rows of a program do not spread evenly over the mesh."""
    _rows("batch_size / micro_batches", config.batch_size // config.micro_batches, mesh)
    if config.rollout_batch:
        _rows("rollout_batch", config.rollout_batch, mesh)
    if config.evaluation.prompts:
        _rows("evaluation.batch_size", config.evaluation.batch_size, mesh)


def _rows(key: str, rows: int, mesh: Mesh) -> None:
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if rows % (data * fsdp):
        raise ValueError(
            f"{key} is {rows}: so many rows do not spread evenly over mesh.data x mesh.fsdp = {data} x "
            f"{fsdp} = {data * fsdp} devices; make it a multiple of {data * fsdp}"
        )


def check_split(path: str, mesh: Mesh) -> list[str]:
    """What an axis of the mesh does not divide, though the run works: that part is whole on every device.

    Raises:
        ValueError: if mesh.tensor does not divide the work of a layer.
    """
    whole = []
    for axis, what, size, part in _splits(models.load_config(path)):
        count = mesh.shape[axis]
        if size % count:
            text = f"mesh.{axis} is {count}, which does not divide the {size} {what} of {path}"
            better = f"the nearest that does is {nearest(size, count)}"
            if part is None:
                raise ValueError(f"{text}; {better}")
            whole.append(f"{text}: {part} are whole on every device; {better}")
    return whole


def _splits(sizes: models.DecoderConfig) -> Iterator[tuple[str, str, int, str | None]]:
    """(axis, what it splits, its size, what would be whole instead; None: it must be split)"""
    yield "tensor", "attention heads", sizes.heads, None
    yield "tensor", "columns of the MLP", sizes.ff_width, None
    yield "tensor", "tokens of the vocabulary", sizes.vocab_size, "embedding and logits"
    yield "fsdp", "columns of the width", sizes.width, "its weights"
