"""What GRPO, Dr. GRPO and DAPO do around the clipped policy gradient."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._policy_gradient import _groups

Aggregation = Literal["token", "sequence", "constant"]


def aggregation_weights(
    where: ArrayLike,
    how: Aggregation = "token",
    *,
    max_length: int | None = None,
    tokens: ArrayLike | None = None,
    sequences: ArrayLike | None = None,
) -> jax.Array:
    r"""Weights whose weighted sum of per-token losses is the batch's loss.

    .. math:: m_{it} / \sum_{jt} m_{jt}, \quad m_{it} / (N \sum_t m_{it}), \quad m_{it} / (N T_m)

    "token" weighs all tokens alike (DAPO, distillation), "sequence" all completions alike (GRPO: tokens of
    long completions count less), "constant" divides by a constant (Dr. GRPO: no dependence on length).
    N is the number of completions of which anything counts. Compute them from the whole batch, or give the
    whole batch's counts, and no split into micro-batches or over devices changes the loss.

    Args:
        where: 1 where a token counts, [B, T].
        how: "token", "sequence" or "constant".
        max_length: T_m, for "constant".
        tokens: tokens that count in the whole batch; None: those of `where`.
        sequences: completions that count in the whole batch; None: those of `where`.

    Returns:
        [B, T] float32; all 0 if nothing counts.

    Raises:
        ValueError: if `how` is unknown, or `max_length` is missing, not positive, or given in vain.

    Example:
        >>> where = [[1, 1, 1], [1, 0, 0]]
        >>> for how in ("token", "sequence"):
        ...     print(aggregation_weights(where, how)[:, 0])
        [0.25 0.25]
        [0.16666667 0.5       ]

    References:
        Yu et al., *DAPO*, `arXiv:2503.14476 <https://arxiv.org/abs/2503.14476>`_;
        Liu et al., *Dr. GRPO*, `arXiv:2503.20783 <https://arxiv.org/abs/2503.20783>`_
    """
    if how not in get_args(Aggregation):
        raise ValueError(f"how must be one of {', '.join(get_args(Aggregation))}, got {how!r}")
    if (how == "constant") != (max_length is not None) or (max_length is not None and max_length < 1):
        raise ValueError(
            f"max_length must be given, and positive, for how='constant' alone; got {max_length}"
        )
    mask = jnp.asarray(where, bool).astype(jnp.float32)
    lengths = mask.sum(-1, keepdims=True)
    if how == "token":
        return mask / jnp.maximum(mask.sum() if tokens is None else tokens, 1)
    rows = jnp.maximum((lengths > 0).sum() if sequences is None else sequences, 1)
    return mask / (rows * (max_length if how == "constant" else jnp.maximum(lengths, 1)))


def informative_groups(rewards: ArrayLike, group_size: int) -> jax.Array:
    """Which completions belong to a group whose rewards differ: DAPO's dynamic sampling.

    In a group of equal rewards all advantages are 0; DAPO leaves it out of the batch, and samples other
    prompts until the batch is full again.

    Args:
        rewards: [B], the completions of a prompt next to each other.
        group_size: completions a prompt, at least 2; divides B.

    Returns:
        [B] bool.

    Raises:
        ValueError: if the group size is below 2 or does not divide B.

    Example:
        >>> print(informative_groups([1.0, 0.0, 1.0, 1.0], 2))
        [ True  True False False]

    References:
        Yu et al., *DAPO*, `arXiv:2503.14476 <https://arxiv.org/abs/2503.14476>`_
    """
    groups = _groups(rewards, group_size)
    return jnp.repeat(groups.max(axis=1) != groups.min(axis=1), group_size)


def overlong_penalty(lengths: ArrayLike, max_length: int, buffer: int) -> jax.Array:
    r"""Soft punishment of completions close to the length limit, to be added to the reward.

    .. math:: 0 \;\text{ up to } L - B, \quad (L - B - n) / B \;\text{ up to } L, \quad -1 \;\text{ beyond}

    Args:
        lengths: n, tokens of each completion, [B].
        max_length: L.
        buffer: B, from 1 to L.

    Returns:
        [B] float32, from -1 to 0.

    Raises:
        ValueError: if the buffer is not from 1 to L.

    Example:
        >>> print(overlong_penalty([10, 90, 100, 120], max_length=100, buffer=20))
        [ 0.  -0.5 -1.  -1. ]

    References:
        Yu et al., *DAPO*, `arXiv:2503.14476 <https://arxiv.org/abs/2503.14476>`_, equation 13
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must be from 1 to max_length = {max_length}, got {buffer}")
    over = (max_length - buffer - jnp.asarray(lengths, jnp.float32)) / buffer
    return jnp.clip(over, -1.0, 0.0) + 0.0  # -0.0 reads badly
