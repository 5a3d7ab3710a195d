"""The fused forms are the dense ones, in less memory."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import losses
from opd_jax.losses import Unembedding
from tests.losses.enumeration import DIVERGENCES, differences, softmax

T, D, TEACHER_D, V = 11, 6, 4, 13
HERE = Path(__file__).parent


def arrays(seed=0, tokens=(T,), vocabulary=(V, V)):
    rng = np.random.default_rng(seed)
    shapes = [(*tokens, D), (D, vocabulary[0]), (*tokens, TEACHER_D), (TEACHER_D, vocabulary[1])]
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def dense(divergence, hidden, head, teacher_hidden, teacher, temperature=1.0, vocabulary=None):
    def logits(hidden, head):
        head = head if isinstance(head, Unembedding) else Unembedding(head)
        z = hidden @ (head.kernel.T if head.transposed else head.kernel)
        z = z if head.bias is None else z + head.bias
        return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)

    both = losses.common_vocabulary(logits(hidden, head), logits(teacher_hidden, teacher), vocabulary)
    return divergence(*(losses.log_softmax(z, temperature) for z in both))


def assert_same(ours, theirs, tolerance=1e-6):
    """Relative to the norm of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def all_forms(divergence, inputs, weights, chunk, **options):
    """[(value per token, gradients in the student's hidden states and head)]: dense, fused, fused_sum."""

    @jax.jit
    def run(inputs, weights):
        hidden, head, *teacher = inputs

        def per_token(form):
            value, pullback = jax.vjp(lambda h, w: form(divergence, h, w, *teacher, **options), hidden, head)
            return value, pullback(weights)

        def total(h, w):
            return losses.fused_sum(divergence, weights, h, w, *teacher, chunk=chunk, **options)

        (sum_, value), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
        fused = partial(losses.fused, chunk=chunk)
        return [per_token(dense), per_token(fused), (value, gradients)], sum_

    forms, sum_ = run(inputs, weights)
    # Of its own values, which the tests compare with the dense form: that one's bfloat16 logits are rounded.
    np.testing.assert_allclose(sum_, jnp.sum(weights * forms[2][0]), rtol=1e-5)
    return forms


@pytest.fixture
def weights():
    return jnp.asarray(np.random.default_rng(9).normal(size=T), jnp.float32)


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 11, 1000])
def test_every_chunk_size(chunk, weights):
    expected, *forms = all_forms(losses.reverse_kl, arrays(), weights, chunk)
    for form in forms:
        assert_same(form, expected)


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if " " not in n])
def test_every_divergence_also_in_float64(name, weights):
    divergence, definition = DIVERGENCES[name]
    inputs = arrays(1)
    expected, *forms = all_forms(divergence, inputs, weights, 4)
    for form in forms:
        assert_same(form, expected, 2e-6)
    hidden, kernel, teacher_hidden, teacher_kernel = (np.asarray(a, np.float64) for a in inputs)
    q = softmax(teacher_hidden @ teacher_kernel)
    value = definition(softmax(hidden @ kernel), q)
    slope = differences(lambda p: definition(p, q), hidden @ kernel) * np.asarray(weights)[:, None]
    exact = (value, (slope @ kernel.T, hidden.T @ slope))
    for form in forms:
        for ours, theirs in zip(jax.tree.leaves(form), jax.tree.leaves(exact), strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-6 * max(1, np.linalg.norm(theirs))


@pytest.mark.parametrize("transposed, vocabulary", [(False, 9), (True, None)])
def test_bias_softcap_temperature_and_padding(weights, transposed, vocabulary):
    hidden, kernel, teacher_hidden, teacher_kernel = arrays(2, vocabulary=(V, V + 3))
    rng = np.random.default_rng(3)
    bias, teacher_bias = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (V, V + 3))
    student = Unembedding(kernel.T if transposed else kernel, bias, softcap=2.0, transposed=transposed)
    teacher = Unembedding(teacher_kernel, teacher_bias, softcap=3.0)
    inputs = [hidden, student, teacher_hidden, teacher]
    expected, *forms = all_forms(losses.jsd, inputs, weights, 3, temperature=1.7, vocabulary=vocabulary)
    for form in forms:
        assert_same(form, expected, 2e-6)
        if vocabulary:
            unused = form[1][1].bias[vocabulary:]
            assert unused.shape == (V - 9,) and not unused.any()


@pytest.mark.parametrize("tokens, chunk", [((2, 7), 6), ((3, 2, 5), 4), ((2, 7), 1)])
def test_leading_axes(tokens, chunk):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=tokens), jnp.float32)
    expected, *forms = all_forms(losses.forward_kl, arrays(4, tokens), weights, chunk)
    for form in forms:
        assert_same(form, expected)


def test_mask(weights):
    hidden, kernel, teacher_hidden, teacher_kernel = arrays(5)
    where = np.random.default_rng(0).random(T) < 0.6
    expected, *_ = all_forms(losses.reverse_kl, arrays(5), weights * where, 4)
    broken = [jnp.where(where[:, None], a, jnp.nan) for a in (hidden, teacher_hidden)]
    _, *forms = all_forms_masked(broken, kernel, teacher_kernel, weights, where)
    for value, gradients in forms:
        np.testing.assert_allclose(value, np.where(where, expected[0], 0), rtol=1e-5, atol=1e-7)
        assert_same(gradients, expected[1])
        assert not gradients[0][~where].any()


def all_forms_masked(states, kernel, teacher_kernel, weights, where):
    def per_token(h, w):
        return losses.fused(losses.reverse_kl, h, w, states[1], teacher_kernel, chunk=4, where=where)

    value, pullback = jax.vjp(per_token, states[0], kernel)

    def total(h, w):
        return losses.fused_sum(
            losses.reverse_kl, weights, h, w, states[1], teacher_kernel, chunk=4, where=where
        )

    (_, values), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(states[0], kernel)
    return None, (value, pullback(weights)), (values, gradients)


def test_nothing_counts():
    inputs = [jnp.full_like(a, jnp.nan) if i % 2 == 0 else a for i, a in enumerate(arrays())]

    def total(h, w):
        options = dict(chunk=4, where=np.zeros(T, bool))
        return losses.fused_sum(losses.reverse_kl, jnp.ones(T), h, w, *inputs[2:], **options)[0]

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(*inputs[:2])
    assert value == 0 and not any(g.any() for g in gradients)


def test_objectives_of_the_sampled_token_and_statistics(weights):
    """What trains on more than two distributions: tokens and rollout log-probs come along by the chunk."""
    inputs = arrays(6)
    tokens = jnp.arange(T) % V
    rollout = -jnp.linspace(1, 4, T)

    def objective(p, q, piece):
        loss = losses.sampled_tail_reverse_kl(p, q, piece["y"], k=3, rollout_log_probs=piece["rollout"])
        return loss, {"entropy": losses.entropy(p), "top": p.argmax(-1)}

    def total(h, w):
        piece = {"y": tokens, "rollout": rollout}
        return losses.fused_sum(objective, weights, h, w, *inputs[2:], chunk=4, per_token=piece)

    def plain(h, w):
        p, q = (jax.nn.log_softmax(a @ b) for a, b in ((h, w), inputs[2:]))
        loss, extra = objective(p, q, {"y": tokens, "rollout": rollout})
        return jnp.sum(weights * loss), (loss, extra)

    ours, theirs = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*inputs[:2]) for f in (total, plain)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_no_gradient_reaches_the_teacher_or_the_weights(weights):
    inputs = arrays()

    def both(*inputs, weights=weights):
        total, _ = losses.fused_sum(losses.reverse_kl, weights, *inputs, chunk=4)
        return total + losses.fused(losses.reverse_kl, *inputs, chunk=4).sum()

    gradients = jax.grad(both, argnums=(2, 3))(*inputs)
    assert not any(g.any() for g in gradients)
    assert not jax.grad(lambda w: both(*inputs, weights=w))(weights).any()


def test_inside_other_transformations(weights):
    """jit, checkpoint, scan over micro-batches and vmap leave value and gradient as they are."""
    hidden, kernel, teacher_hidden, teacher_kernel = arrays(7, (4, T))

    def loss(h, w, th):
        return weights @ losses.fused(losses.reverse_kl, h, w, th, teacher_kernel, chunk=4)

    def scanned(h, w):
        body = jax.checkpoint(lambda total, row: (total + loss(row[0], w, row[1]), None))
        return jax.lax.scan(body, 0.0, (h, teacher_hidden))[0]

    def mapped(h, w):
        return jax.vmap(loss, in_axes=(0, None, 0))(h, w, teacher_hidden).sum()

    def plain(h, w):
        return (dense(losses.reverse_kl, h, w, teacher_hidden, teacher_kernel) @ weights).sum()

    expected, *ours = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, kernel) for f in (plain, scanned, mapped)
    )
    for form in ours:
        assert_same(form, expected, 2e-6)


def test_bfloat16(weights):
    """Products are summed in float32, gradients have the parameters' dtype."""
    inputs = arrays(8)
    narrow = [a.astype(jnp.bfloat16) for a in inputs]
    wide = [a.astype(jnp.float32) for a in narrow]
    expected, *_ = all_forms(losses.reverse_kl, wide, weights, 4)
    _, *forms = all_forms(losses.reverse_kl, narrow, weights, 4)
    for value, gradients in forms:
        assert value.dtype == jnp.float32 and {g.dtype for g in gradients} == {jnp.dtype("bfloat16")}
        np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(gradients, expected[1], strict=True):
            assert np.linalg.norm(ours.astype(jnp.float32) - theirs) < 1e-2 * np.linalg.norm(theirs)


def test_wrong_inputs(weights):
    h, w, th, tw = arrays()
    kl = losses.reverse_kl
    for message, call in {
        r"student's hidden states \(11, 5\) do not fit its kernel": lambda: losses.fused(
            kl, h[:, :5], w, th, tw
        ),
        "teacher's hidden states": lambda: losses.fused(kl, h, w, th, tw.T),
        "same tokens": lambda: losses.fused(kl, h, w, th[:-1], tw),
        "bias must be": lambda: losses.fused(kl, h, Unembedding(w, jnp.zeros(3)), th, tw),
        "softcap must be positive": lambda: losses.fused(kl, h, Unembedding(w, softcap=0.0), th, tw),
        "chunk must be": lambda: losses.fused(kl, h, w, th, tw, chunk=0),
        "temperature must be": lambda: losses.fused(kl, h, w, th, tw, temperature=0.0),
        "1 to 13 tokens": lambda: losses.fused(kl, h, w, th, tw, vocabulary=14),
        r"must start with \(11,\)": lambda: losses.fused(kl, h, w, th, tw, where=np.ones(3, bool)),
        r"weights must have the tokens' shape": lambda: losses.fused_sum(kl, weights[:3], h, w, th, tw),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def program(form, divergence, tokens, chunk):
    def loss(hidden, kernel, teacher_hidden, teacher_kernel, weights):
        inputs = (hidden, kernel, teacher_hidden, teacher_kernel)
        if form == "fused_sum":
            return losses.fused_sum(divergence, weights, *inputs, chunk=chunk)[0]
        return jnp.sum(weights * losses.fused(divergence, *inputs, chunk=chunk))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def shapes(tokens, width, vocabulary):
    sizes = [(tokens, width), (width, vocabulary)] * 2 + [(tokens,)]
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in sizes]


def elements(text):
    return [int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"\[(\d[\d,]*)\]", text)]


@pytest.mark.parametrize("form", ["fused", "fused_sum"])
def test_no_array_larger_than_a_chunk(form):
    tokens, width, vocabulary, chunk = 96, 8, 512, 16
    compiled = program(form, losses.jsd, tokens, chunk).lower(*shapes(tokens, width, vocabulary)).compile()
    assert max(elements(compiled.as_text())) == chunk * vocabulary


# The bound holds while a chunk of logits is small next to the kernels; jsd needs more of them at a time.
@pytest.mark.parametrize(
    "form, name, chunk",
    [("fused", "reverse_kl", 256), ("fused_sum", "reverse_kl", 128), ("fused_sum", "jsd", 64)],
)
def test_peak_memory_at_full_size(form, name, chunk):
    """At most 1.25 times (inputs, gradients, one chunk), compiled for 4,096 tokens of 151,936 logits."""
    tokens, width, vocabulary = 4096, 1024, 151936
    compiled = (
        program(form, getattr(losses, name), tokens, chunk)
        .lower(*shapes(tokens, width, vocabulary))
        .compile()
    )
    memory = compiled.memory_analysis()
    floor = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert floor >= 4 * 3 * (tokens + vocabulary) * width
    assert floor + memory.temp_size_in_bytes <= 1.25 * (floor + 4 * chunk * vocabulary)


def collectives(text):
    found = re.findall(
        r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)", text
    )
    return [n for line in found for n in elements(re.sub(r"\{[^}]*\}", "", line))]


@pytest.mark.slow
def test_vocabulary_sharded_over_a_mesh():
    """Same numbers; forward, only one number a token crosses devices, backward also the hidden states."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    one = Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "tensor"))
    batch, count, vocabulary, chunk = 4, 6, 512, 8
    inputs = arrays(9, (batch, count), (vocabulary, vocabulary))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(batch, count)), jnp.float32)

    def value(weights, h, w, th, tw):
        return jnp.sum(weights * losses.fused(losses.jsd, h, w, th, tw, chunk=chunk))

    def total(weights, *inputs):
        return losses.fused_sum(losses.jsd, weights, *inputs, chunk=chunk)[0]

    expected = jax.jit(jax.value_and_grad(value, argnums=(1, 2)))(weights, *inputs)
    specs = (P("data"), P("data"), P(None, "tensor"), P("data"), P(None, "tensor"))
    for function in (value, total):
        step = jax.jit(jax.value_and_grad(function, argnums=(1, 2)))
        placed = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((weights, *inputs), specs, strict=True)
        ]
        ours = step(*placed)
        assert_same(jax.tree.map(np.asarray, ours), jax.tree.map(np.asarray, expected), 2e-6)
        placed = [
            jax.device_put(a, NamedSharding(one, s)) for a, s in zip((weights, *inputs), specs, strict=True)
        ]
        forward = collectives(jax.jit(function).lower(*placed).compile().as_text())
        assert forward and max(forward) <= batch * count
        backward = collectives(step.lower(*placed).compile().as_text())
        assert max(backward) <= batch * count * D < D * vocabulary // 4


@pytest.mark.tpu
def test_compiled_for_a_tpu():
    """The optimised program holds no array of more than chunk x V elements; the dense one does."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu (CONTRIBUTING.md says how to get it)")
    paths = [str(HERE.parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    command = [sys.executable, str(HERE / "tpu_fused.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    chunk = report.pop("chunk_elements")
    assert report.pop("dense")["largest"] > chunk
    for name, found in report.items():
        assert found["largest"] <= chunk, (name, found)
    tokens, width = 2048, 256
    assert report["fused forward, vocabulary sharded"]["largest_collective"] <= tokens
    assert report["fused, vocabulary sharded"]["largest_collective"] <= tokens * width
