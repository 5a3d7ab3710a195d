"""Rotary position embeddings, in the half-split layout of Hugging Face checkpoints."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from opd_jax.models._config import RopeScaling


def rope_frequencies(head_width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each rotated pair, `theta^(-2i/H)`, stretched by `scaling`.

    Returns:
        [H/2] float32, computed in float64.
    """
    frequencies = theta ** -(np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.type == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    wavelength = 2 * math.pi / frequencies
    smooth = scaling.original_max_length / wavelength - scaling.low_freq_factor
    smooth = np.clip(smooth / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return blended.astype(np.float32)


def rope_tables(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosines and sines for `positions` [B, T]: each [B, T, 1, H/2] float32."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates `x` [B, T, heads, H], pairing i with i + H/2, in float32; keeps its dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
