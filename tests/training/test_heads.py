"""Unembedding in a loop, on a mesh: the same numbers, and messages that do not grow with the loop's turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opd_jax.models._protocol import unembed
from opd_jax.parallel import batch_sharding, make_mesh, param_shardings
from opd_jax.parallel._cost import cost
from opd_jax.training._heads import unembedder

ROWS, TOKENS = 8, 24


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 2, 2, devices=jax.devices()[:8])


def loss(graphdef, head_of, turns):
    """The mean entropy of all tokens' distributions, a part of the tokens at a time."""

    def total(params, hidden):
        head = head_of(nnx.merge(graphdef, params))

        @jax.checkpoint
        def turn(states):
            log_probs = jax.nn.log_softmax(head(states))
            return -(jnp.exp(log_probs) * log_probs).sum(-1)

        parts = jnp.moveaxis(hidden.reshape(ROWS, turns, -1, hidden.shape[-1]), 1, 0)
        return jax.lax.map(turn, parts).mean()

    return jax.value_and_grad(total, argnums=(0, 1))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, make_model):
    graphdef, params = nnx.split(make_model(3, tie_embeddings=request.param))
    return graphdef, params, np.random.default_rng(0).normal(size=(ROWS, TOKENS, 16)).astype(np.float32)


def compiled(mesh, graphdef, params, hidden, turns):
    place = param_shardings(params, mesh)
    given = jax.device_put(params, place), jax.device_put(hidden, batch_sharding(mesh))
    step = loss(graphdef, lambda model: unembedder(model, ROWS), turns)
    with jax.set_mesh(mesh):
        done = jax.jit(step, out_shardings=(None, (place, None))).lower(*given).compile()
        return done, done(*given)


def test_numbers_are_those_of_the_plain_unembedding(mesh, model):
    graphdef, params, hidden = model
    one = jax.jit(loss(graphdef, lambda model: lambda states: unembed(model, states), 1))(params, hidden)
    _, many = compiled(mesh, graphdef, params, hidden, 3)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6, rtol=1e-5)


def test_what_is_sent_does_not_depend_on_the_turns(mesh, model):
    """But for the softmax's sums over a split vocabulary, which are a few numbers a token."""
    few, many = (cost(compiled(mesh, *model, turns)[0].as_text()) for turns in (2, 12))
    assert many.flops == few.flops > 0
    assert many.sent == few.sent > 0


def test_without_a_mesh_it_is_the_plain_one(model, bare_model):
    graphdef, params, hidden = model
    module = nnx.merge(graphdef, params)
    np.testing.assert_array_equal(unembedder(module, ROWS)(hidden), unembed(module, hidden))
    np.testing.assert_array_equal(unembedder(bare_model, ROWS)(hidden), hidden)


@pytest.mark.parametrize("rows", [6, 2])
def test_rows_that_do_not_spread_evenly(mesh, model, rows):
    graphdef, params, hidden = model
    with jax.set_mesh(mesh):
        module = nnx.merge(graphdef, params)
        np.testing.assert_allclose(
            unembedder(module, rows)(hidden[:rows]), unembed(module, hidden[:rows]), atol=1e-6
        )
