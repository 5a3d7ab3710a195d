"""Measures what `track_subspace` costs a training step, and how close it comes to an exact SVD.

    python scripts/measure_transforms.py cost        # SmolLM2-135M shapes, CPU, interleaved medians
    python scripts/measure_transforms.py accuracy    # updates of a short run of a small model; random spectra

Times are CPU seconds of the process, which hold on a busy machine; wall seconds stand beside them.
"""

import argparse
import os
import statistics
import time
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from opd_jax import models
from opd_jax.transforms import spectrum, track_subspace

SMOLLM2 = dict(
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    ff_width=1536,
    tie_embeddings=True,
)
SMALL = dict(
    vocab_size=512, width=256, layers=4, heads=4, kv_heads=2, head_width=64, ff_width=704, tie_embeddings=True
)
RANK = 16
_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _seconds, **_: (
        _COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
)


def make(sizes):
    """Parameters and a loss of (parameters, tokens)."""
    config = models.DecoderConfig(**sizes)
    graphdef, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))

    def loss(params, tokens):
        logits = nnx.merge(graphdef, params).logits(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return params, loss


def batches(sizes, batch, length):
    """Noisy counting, so that there is something to learn."""
    rng = np.random.default_rng(0)
    while True:
        start, stride = rng.integers(0, 1000, (2, batch, 1))
        tokens = start + (1 + stride % 7) * np.arange(length) + (rng.random((batch, length)) < 0.1)
        yield jnp.asarray(tokens % min(sizes["vocab_size"], 509), jnp.int32)


def stepper(loss, optimizer, compiler_options=None):
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler_options)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def cost(args):
    """One program for each variant, one step of each in turn: a probe's cost is that of a step with one."""
    sizes = SMOLLM2 | dict(layers=args.layers)
    params, loss = make(sizes)
    tokens = batches(sizes, args.batch, args.length)
    variants = {"adamw": None, "of=updates": {}, "of=displacement": dict(of="displacement")}
    if args.lanczos:
        variants["lanczos=(8, 16)"] = dict(lanczos=(8, 16))
    runs, adam_bytes = {}, 0
    for name, options in variants.items():
        tracker = [] if options is None else [track_subspace(RANK, args.every, **options)]
        optimizer = optax.chain(optax.adamw(1e-4), *tracker)
        state = jax.jit(optimizer.init)(params)
        adam_bytes = adam_bytes or nbytes(state)
        if tracker:
            extra = nbytes(state) - adam_bytes
            print(f"{name}: state {extra / 1e6:.1f} MB, {extra / adam_bytes:.2%} of Adam's")
        runs[name] = [stepper(loss, optimizer), state, {True: [], False: []}]
    # Two thirds of the memory are the copies of the parameters, so all variants move the same ones.
    for count in range(args.warm_up + args.steps):
        if count == args.warm_up:
            _COMPILED.clear()
        batch = next(tokens)
        for name, run in runs.items():
            step, state, seconds = run
            start = time.process_time(), time.perf_counter()
            params, run[1], value = step(params, state, batch)
            jax.block_until_ready((params, run[1], value))
            spent = time.process_time() - start[0], time.perf_counter() - start[1]
            if count >= args.warm_up:
                seconds[name != "adamw" and count % args.every == 0].append(spent)
    print(f"recompilations in {args.steps} steps of each: {len(_COMPILED)}")
    report_cost(runs, args)


def report_cost(runs, args):
    def median(rows, unit):
        return statistics.median(row[unit] for row in rows)

    for unit, what in enumerate(("CPU", "wall")):
        plain = median(runs["adamw"][2][False], unit)
        print(f"{what}: adamw {plain:.3f} s a step, median of {len(runs['adamw'][2][False])}")
        for name, (_, _, seconds) in runs.items():
            if name != "adamw":
                quiet, probe = (median(seconds[due], unit) for due in (False, True))
                always, never = probe / plain - 1, quiet / plain - 1
                tenth = (always + 9 * never) / 10
                print(
                    f"  {name}: step with a probe {always:+.1%} (every=1), without {never:+.1%}, "
                    f"mean at every=10 {tenth:+.1%}; {len(seconds[True])} probes"
                )


def accuracy(args):
    print("case | spectral norm | ratio | top 1% | effective rank: bound, Lanczos | angle of 8 | s8/s9")
    for name, sequence in real_updates(args.steps).items():
        compare(name, sequence, args.iterations)
    rng = np.random.default_rng(0)
    for name, shape, values in (
        ("i^-1", (576, 1536), 1.0 / np.arange(1, 577)),
        ("i^-0.5", (576, 576), np.arange(1, 577) ** -0.5),
        ("2^-i and noise 1e-3", (576, 1536), 2.0 ** -np.arange(1, 577) + 1e-3),
        ("Gaussian", (576, 576), None),
    ):
        compare(name, drifting(rng, shape, values, args.probes), args.iterations)


def drifting(rng, shape, values, probes):
    """Matrices that change by 0.3% of their norm from one to the next."""
    x = rng.normal(size=shape)
    if values is not None:
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        x = (u * values) @ vt
    for _ in range(probes):
        yield x.astype(np.float32)
        noise = rng.normal(size=shape)
        x = x + 0.003 * np.linalg.norm(x) / np.linalg.norm(noise) * noise


def real_updates(steps):
    """Of two matrices of a model in training: the updates every 10 steps, and the sums of them."""
    params, loss = make(SMALL)
    optimizer = optax.chain(optax.adamw(1e-3), track_subspace(RANK, 1, of="displacement"))
    step, state = stepper(loss, optimizer), jax.jit(optimizer.init)(params)
    tokens, found = batches(SMALL, 8, 64), {}
    places = {"attention q": ("attention", "q"), "mlp up": ("mlp", "up")}
    before = {}
    for count in range(steps):
        params, state, _ = step(params, state, next(tokens))
        for name, (module, part) in places.items():
            moved = np.asarray(state[-1].track_displacement["layers"][module][part]["kernel"][...][1])
            if count % 10 == 0:
                found.setdefault(f"run, displacement of {name}", []).append(moved)
                found.setdefault(f"run, updates of {name}", []).append(moved - before.get(name, 0.0))
            before[name] = moved
    return found


@partial(jax.jit, static_argnames="iterations")
def _probed(x, probe, iterations):
    """The transform on one matrix."""
    return track_subspace(RANK, 1, iterations=iterations).update({"up": x}, probe)[1]


@jax.jit
def _lanczos(x, found):
    return spectrum.effective_rank_estimate(x, found)


def compare(name, sequence, iterations):
    """Errors after the last of a sequence of matrices, each probed once."""
    state = None
    for x in sequence:
        state = track_subspace(RANK, 1).init({"up": jnp.asarray(x)}) if state is None else state
        state = _probed(jnp.asarray(x), state, iterations)
    (probe,) = state.track_probes
    u, s, _ = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    norm, (first, *_) = np.linalg.norm(s), s
    values = np.asarray(probe.values[0], np.float64)
    rank = float(spectrum.effective_rank(s))
    top = int(np.ceil(len(s) / 100))
    exact, mine = (np.sqrt((v[:top] ** 2).sum()) / norm for v in (s, values))
    left = np.asarray(probe.left[0, :, :8])
    sines = np.linalg.svd(u[:, :8] - left @ (left.T @ u[:, :8]), compute_uv=False)
    estimate = float(_lanczos(x, spectrum.Subspace(probe.left[0], probe.values[0], probe.right[0])))
    print(
        f"{name} {x.shape} | {values[0] / first - 1:+.2%} | "
        f"{values[0] / float(probe.norm[0]) / (first / norm) - 1:+.2%} | "
        f"{100 * (mine - exact):+.2f} points | "
        f"{float(probe.effective_rank[0]) / rank - 1:+.1%}, {estimate / rank - 1:+.1%} of {rank:.0f} | "
        f"{np.degrees(np.arcsin(min(sines[0], 1.0))):.2f} deg | {s[7] / s[8]:.2f}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cost", "accuracy"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=65)
    parser.add_argument("--every", type=int, default=2, help="of the variants timed; both kinds of step are")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=1, help="of a probe")
    parser.add_argument("--lanczos", action="store_true", help="also time the estimate of the effective rank")
    args = parser.parse_args()
    args.steps = args.steps or {"cost": 12, "accuracy": 41}[args.what]
    (cost if args.what == "cost" else accuracy)(args)


main()
