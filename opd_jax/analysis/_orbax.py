"""The checkpoints that `opd-jax train` writes as it goes, a matrix at a time."""

from pathlib import Path
from typing import Any

import numpy as np

from opd_jax._extras import require
from opd_jax.analysis._sources import TreeCheckpoint

_PARAMS = "params."


class StepCheckpoint(TreeCheckpoint):
    """`checkpoints/STEP` of a run folder: the trained parameters, float32. What orbax does not notice, such
    as a flipped bit, is not noticed here either.

    Raises:
        ValueError: if it is damaged, or holds no parameters of a model.
    """

    def __init__(self, folder: Path):
        self.label = str(folder)
        self._manifest = folder / "state" / "manifest.ocdbt"
        self._take(step_leaves(folder))

    def identity(self, name: str) -> str:
        stat = self._manifest.stat()  # a checkpoint appears whole and is never written again
        parts = (self._manifest.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return "|".join(map(str, (*parts, name)))


class _Leaf:
    """An array on disk that numpy reads when asked for."""

    def __init__(self, tensorstore: Any, where: dict[str, str], name: str):
        spec = {"driver": "zarr", "kvstore": where | {"path": f"{name}/"}}
        self._stored = tensorstore.open(spec, read=True, open=True).result()
        self.shape, self.ndim = tuple(self._stored.shape), len(self._stored.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return self._stored[index].read().result()
        except Exception as error:
            raise ValueError(f"an array is damaged: {str(error).splitlines()[0][:300]}") from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype)


def is_step(folder: Path) -> bool:
    """Whether a folder is one of a run's `checkpoints`."""
    return (folder / "_CHECKPOINT_METADATA").exists() and (folder / "state").is_dir()


def step_leaves(folder: Path) -> dict[str, Any]:
    """The trained parameters in a step's folder by name, such as "layers.mlp.up.kernel"; each is read when it
    is made an array.

    Raises:
        ValueError: if the folder is damaged, or holds adapters without their base.
    """
    tensorstore = require("tensorstore")
    where = {"driver": "ocdbt", "base": f"file://{(folder / 'state').resolve()}/"}
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(where).result().list().result()]
        names = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
        leaves = {
            name.removeprefix(_PARAMS).removesuffix(".value"): _Leaf(tensorstore, where, name)
            for name in sorted(names)
            if name.startswith(_PARAMS)
        }
    except Exception as error:  # tensorstore raises many kinds, with pages of text
        raise ValueError(f"{folder} cannot be read: {str(error).splitlines()[0][:300]}") from None
    if any(".adapter." in name for name in leaves):
        raise ValueError(
            f"{folder} holds the adapters of a LoRA run without their base; give the run's final model, "
            "or adapters saved by `opd_jax.models.save_lora`"
        )
    return leaves
