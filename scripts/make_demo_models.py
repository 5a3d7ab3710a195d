"""Makes the models of the demo: a base by supervised training, and its teacher by reinforcement learning.

    python scripts/make_demo_models.py            # about 15 minutes on two cores; writes opd_jax/demo/

The base (0.41M parameters, Qwen3 architecture) imitates demonstrations that are often wrong, until it has the
skill but seldom shows it when sampled; the teacher is that base after GRPO with the task's verifier. Both go
through the same public code as any other run.
"""

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

from flax import nnx

from opd_jax import models, training
from opd_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    StudentConfig,
)
from opd_jax.tasks import arithmetic

_DECODER = dict(
    architecture="Qwen3ForCausalLM",
    width=96,
    layers=4,
    heads=4,
    kv_heads=2,
    head_width=24,
    ff_width=256,
    rope_theta=10_000.0,
    norm_epsilon=1e-6,
    qk_norm=True,
    tie_embeddings=False,
    max_length=64,
)
_EVALUATION = EvaluationConfig(prompts=512, options=dict(split="held_out", seed=0, size=512), batch_size=128)
_COMMON = dict(
    max_new_tokens=32,
    evaluation=_EVALUATION,
    checkpoint=CheckpointConfig(every=10_000),
    logging=LoggingConfig(every=10),
    loss_chunk=4096,
)


def random_model(folder: Path, seed: int) -> Path:
    """A model of the demo's shape with random weights, tokenizer included."""
    tokenizer = arithmetic.make_tokenizer()
    config = models.DecoderConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        **_DECODER,
    )
    models.save(models.Decoder(config, rngs=nnx.Rngs(seed)), folder)
    tokenizer.save_pretrained(folder)
    return folder


def supervised(student: Path, run_dir: Path, steps: int, rate: float, seed: int) -> Config:
    return Config(
        objective="sft",
        steps=steps,
        batch_size=128,
        seed=seed,
        run_dir=str(run_dir),
        student=StudentConfig(path=str(student)),
        data=DataConfig(
            source="arithmetic",
            max_prompt_length=16,
            options=dict(split="train", seed=seed, size=40_000, demonstrations="mixed"),
        ),
        optimizer=OptimizerConfig(
            learning_rate=rate, schedule="cosine_decay_schedule", schedule_options=dict(decay_steps=steps)
        ),
        **_COMMON,
    )


def reinforced(student: Path, run_dir: Path, steps: int, rate: float, seed: int) -> Config:
    return Config(
        objective="grpo",
        steps=steps,
        batch_size=192,
        samples_per_prompt=8,
        seed=seed,
        run_dir=str(run_dir),
        student=StudentConfig(path=str(student)),
        data=DataConfig(
            source="arithmetic", max_prompt_length=16, options=dict(split="train", seed=seed, size=20_000)
        ),
        optimizer=OptimizerConfig(learning_rate=rate),
        **{**_COMMON, "evaluation": dataclasses.replace(_EVALUATION, every=25)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("opd_jax/demo"))
    parser.add_argument(
        "--work", type=Path, default=Path("runs/demo_models"), help="run folders; resumed if there"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    work, seed = args.work, args.seed
    first = random_model(work / "random", seed)
    undertrained = training.train(supervised(first, work / "sft1", 400, 2e-3, seed)).model
    base = training.train(supervised(undertrained, work / "sft2", 500, 1.5e-3, seed + 1))
    teacher = training.train(reinforced(base.model, work / "grpo", 100, 3e-4, seed + 2))
    for name, result in (("base", base), ("teacher", teacher)):
        accuracy, error = result.after["accuracy"], result.after["accuracy_error"]
        print(f"{name}: accuracy {accuracy:.3f} +- {error:.3f} (512 held-out prompts, temperature 1)")
        shutil.rmtree(args.out / name, ignore_errors=True)
        shutil.copytree(result.model, args.out / name)
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
