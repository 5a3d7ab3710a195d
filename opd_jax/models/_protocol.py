"""What rollout and training need of a model; `Decoder` has it, and a user's own nnx module may."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp


class LanguageModel(Protocol):
    """A causal language model as a flax.nnx module.

    It may also have `hidden_states`, which takes what calling it takes and `prefill=False` (a promise that
    the cache is empty), and `unembed(hidden) -> logits`: with both, the loss holds the logits of a few
    tokens at a time; without them, those of the whole batch.
    """

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Any = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits [B, T, V] of the next tokens and the cache.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32; None counts from 0.
            cache: what `init_cache` or an earlier call returned: the T tokens go to its next T slots, and
                attend to the slots before them, and causally to each other. None: causal over T.
            mask: slots that may be attended to, [B, S] bool; None: all that are filled.
        """
        ...

    def init_cache(self, batch: int, slots: int) -> Any:
        """An empty cache: a pytree of arrays."""
        ...


def hidden_states(model: LanguageModel, tokens: jax.Array, **kwargs: Any) -> tuple[jax.Array, Any]:
    """What `unembed` turns into logits, [B, T, D], and the cache; takes what calling the model takes."""
    if _has_both(model):
        return model.hidden_states(tokens, **kwargs)
    kwargs.pop("prefill", None)
    return model(tokens, **kwargs)


def unembed(model: LanguageModel, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] float32 from hidden states [..., D]."""
    if _has_both(model):
        return model.unembed(hidden)
    return hidden.astype(jnp.float32)


def _has_both(model: LanguageModel) -> bool:
    return hasattr(model, "hidden_states") and hasattr(model, "unembed")
