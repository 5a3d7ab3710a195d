"""Makes the golden models of tests/models: tiny random ones, and what transformers computes with them.

Needs torch, transformers, safetensors (and gguf, accelerate for --smollm2). Run once; the outcome is
committed. Usage:

    python scripts/make_goldens.py                        # tests/models/goldens/*/
    python scripts/make_goldens.py --smollm2 MODEL.gguf   # tests/models/goldens/smollm2.json as well
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).parent.parent / "tests" / "models" / "goldens"
SIZES = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
DEFAULT = dict(rope_type="default", rope_theta=10000.0)
# Name -> class prefix, settings over SIZES.
MODELS = {
    "llama_mha": ("Llama", dict(num_key_value_heads=4, rope_parameters=DEFAULT)),
    "llama_bias": ("Llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=DEFAULT)),
    "llama3_gqa_tied": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama_linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    ),
    "smollm2": (
        "Llama",
        dict(
            hidden_size=36,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=100000.0),
        ),
    ),
    "qwen2_tied": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=DEFAULT)),
    "qwen2_untied": ("Qwen2", dict(tie_word_embeddings=False, rope_parameters=DEFAULT)),
    "qwen3_tied": ("Qwen3", dict(head_dim=6, tie_word_embeddings=True, rope_parameters=DEFAULT)),
    "qwen3_wide_heads": (
        "Qwen3",
        dict(head_dim=16, eos_token_id=[2, 3], rope_parameters={**DEFAULT, "rope_theta": 1e6}),
    ),
}
PROMPTS = [  # (text, through the chat template?)
    ("The capital of France is", False),
    ("Once upon a time", False),
    ("The sea is", True),
    ("What is the capital of France?", True),
    ("12 + 7 =", True),
]


def make(name: str, prefix: str, settings: dict, seed: int) -> None:
    """Writes one tiny model, weights in bfloat16, and its float32 logits on random tokens."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **settings})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for path, parameter in model.named_parameters():
        # Far from the usual small start, so that attention and norms matter.
        spread = 0.3 * torch.randn_like(parameter)
        value = 1 + spread if path.endswith("norm.weight") else spread
        parameter.data = value.to(torch.bfloat16)
    folder = GOLDENS / name
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    model.float()
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = model(tokens).logits
    np.savez_compressed(folder / "golden.npz", tokens=tokens.numpy(), logits=logits.numpy())
    print(f"{name}: largest logit {logits.abs().max():.2f}")


def greedy(gguf: Path, new_tokens: int) -> None:
    """Writes greedy continuations by transformers of the GGUF file, which it dequantises itself."""
    options = dict(gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **options
    ).eval()
    records = []
    for text, chat in PROMPTS:
        if chat:
            turn = [{"role": "user", "content": text}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        else:
            prompt = tokenizer(text)["input_ids"]
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens)
            logits = model(out).logits[0, len(prompt) - 1 : -1]
        completion = out[0, len(prompt) :].tolist()
        top = logits.topk(2).values
        records.append(
            dict(
                text=text,
                chat=chat,
                prompt=list(prompt),
                completion=completion,
                completion_text=tokenizer.decode(completion),
                smallest_margin=round(float((top[:, 0] - top[:, 1]).min()), 4),
            )
        )
        print(records[-1]["completion_text"], records[-1]["smallest_margin"])
    text = ",\n".join(json.dumps(record) for record in records)
    (GOLDENS / "smollm2.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


def main() -> None:
    """Makes every golden."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="the GGUF file of SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    for seed, (name, (prefix, settings)) in enumerate(MODELS.items()):
        make(name, prefix, settings, seed)
    if arguments.smollm2:
        greedy(arguments.smollm2, new_tokens=24)


if __name__ == "__main__":
    main()
