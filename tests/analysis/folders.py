"""Small checkpoints on disk, written by safetensors itself."""

import json

import numpy as np
from safetensors.numpy import save_file

SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in (
            ("self_attn.q_proj", (16, 16)),
            ("self_attn.k_proj", (8, 16)),
            ("mlp.up_proj", (24, 16)),
            ("mlp.down_proj", (16, 24)),
            ("input_layernorm", (16,)),
        )
    },
}


def random_tensors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def write_folder(folder, tensors, *, shards=1, **config):
    """A Hugging Face folder with these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | config
    (folder / "config.json").write_text(json.dumps(kept))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder
