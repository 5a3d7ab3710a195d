"""Tiny model folders, and what a run leaves behind."""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from opd_jax import models
from opd_jax.tasks import arithmetic

_TIMES = ("time", "seconds", "share", "per_second")


def make_folder(folder: Path, seed: int, **changes) -> str:
    tokenizer = arithmetic.make_tokenizer()
    sizes = dict(width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=32) | changes
    config = models.DecoderConfig(
        vocab_size=len(tokenizer),
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        max_length=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        **sizes,
    )
    graphdef, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(seed)))
    params = jax.tree.map(lambda p: 5 * p if p.ndim > 1 else p, params)  # or all logits are near 0
    models.save(nnx.merge(graphdef, params), folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_weights(model: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(model / "model.safetensors")


def read_metrics(run_dir: str, timings: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    if timings:
        return lines
    return [{k: v for k, v in line.items() if not any(t in k for t in _TIMES)} for line in lines]


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
