"""What a plan counts, against programs small enough to count by hand."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from opd_jax.models._attention import kernel_flops
from opd_jax.parallel import CHIPS, compiling_for, nearest, platform, topology
from opd_jax.parallel._chips import TOPOLOGIES, bound
from opd_jax.parallel._cost import cost

_LOOP = """
HloModule jit_f
%fused (p: f32[8,4,6], q: s32[]) -> f32[4,6] {
  %p = f32[8,4,6]{2,1,0} parameter(0)
  %q = s32[] parameter(1)
  %z = s32[] constant(0)
  %slice = f32[1,4,6]{2,1,0} dynamic-slice(%p, %q, %z, %z), dynamic_slice_sizes={1,4,6}
  ROOT %flat = f32[4,6]{1,0} bitcast(%slice)
}
%body (s: (s32[], f32[2,4], f32[8,4,6])) -> (s32[], f32[2,4], f32[8,4,6]) {
  %s = (s32[], f32[2,4]{1,0}, f32[8,4,6]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[2,4]{1,0} get-tuple-element(%s), index=1
  %w = f32[8,4,6]{2,1,0} get-tuple-element(%s), index=2
  %layer = f32[4,6]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %y = f32[2,6]{1,0} dot(%x, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[2,6]{1,0:S(1)} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[2,4]{1,0}, f32[8,4,6]{2,1,0}) tuple(%i, %x, %w)
}
%condition (s: (s32[], f32[2,4], f32[8,4,6])) -> pred[] {
  %s = (s32[], f32[2,4]{1,0}, f32[8,4,6]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (a: (s32[], f32[2,4], f32[8,4,6])) -> (s32[], f32[2,4], f32[8,4,6]) {
  %a = (s32[], f32[2,4]{1,0}, f32[8,4,6]{2,1,0}) parameter(0)
  ROOT %while = (s32[], f32[2,4]{1,0}, f32[8,4,6]{2,1,0}) while(%a), condition=%condition, body=%body
}
"""


def one(line: str, *parameters: str) -> str:
    """A program of one instruction."""
    given = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(parameters)]
    return "\n".join(["ENTRY %main () -> f32[] {", *given, f"  ROOT %r = {line}", "}"])


def test_a_loop_counts_as_often_as_it_runs():
    found = cost(_LOOP)
    assert found.flops == 8 * 2 * 2 * 6 * 4
    layer = 96 + 4 + 96  # of the stack of layers one is read, and an index; it is written
    product, summed, condition = 32 + 96 + 48, 48, 4 + 4 + 1  # the sum stays in fast memory
    assert found.bytes == 8 * (layer + product + summed + condition)
    assert found.collectives == {"all-reduce": [8, 8 * 2 * 48 * 3 / 4]}


def test_a_counter_that_starts_and_steps_elsewhere():
    """XLA unrolls the loops of products whose operand comes in parts."""
    text = _LOOP.replace(
        "ROOT %t = (s32[], f32[2,4]{1,0}, f32[8,4,6]{2,1,0}) tuple(%i,",
        "%two = s32[] constant(2)\n  %j = s32[] add(%i, %two)\n"
        "  ROOT %t = (s32[], f32[2,4]{1,0}, f32[8,4,6]{2,1,0}) tuple(%j,",
    )
    assert text != _LOOP and cost(text).flops == 4 * 2 * 2 * 6 * 4


@pytest.mark.parametrize(
    ("groups", "size"),
    [("replica_groups=[2,4]<=[8]", 4), ("replica_groups={{0,1},{2,3}}", 2),
     ("replica_groups=mesh['a'=2,'b'=8] {'b'}", 8),
     ("replica_groups=mesh['a'=2,'b'=1,'c'=8], device_ids=([2,8]T(1,0)) {'c','b'}", 8)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "factor"),
    [("all-gather", lambda n: n - 1), ("all-reduce", lambda n: 2 * (n - 1) / n),
     ("reduce-scatter", lambda n: (n - 1) / n), ("all-to-all", lambda n: (n - 1) / n)],
)  # fmt: skip
def test_what_collectives_send(kind, factor, groups, size):
    found = cost(one(f"bf16[64]{{0}} {kind}(%p0), channel_id=3, {groups}, dimensions={{0}}", "bf16[32]{0}"))
    assert found.collectives == {kind: [1, 64 * factor(size)]}


def test_an_asynchronous_collective_counts_once():
    text = """ENTRY %main () -> f32[] {
  %p = f32[32]{0} parameter(0)
  %s = (f32[32]{0}, f32[128]{0}) all-gather-start(%p), channel_id=5, replica_groups={{0,1,2,3}}
  %d = f32[128]{0} all-gather-done(%s)
  %again = f32[128]{0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3}}
}
"""
    assert cost(text).collectives == {"all-gather": [1, 3 * 128]}


def test_products_written_as_convolutions():
    plain = one(
        "f32[18,6]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf", "f32[18,4]{1,0}", "f32[4,6]{1,0}"
    )
    assert cost(plain).flops == 2 * 18 * 4 * 6
    # A batch of 3 products [5, 4] x [4, 6], as XLA:TPU writes it.
    batch = one(
        "f32[3,5,6]{2,1,0} convolution(%p0, %p1), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, "
        "dim_labels=0bf_0io->0bf",
        "f32[3,5,4]{2,1,0}",
        "f32[3,4,6]{2,1,0}",
    )
    assert cost(batch).flops == 3 * 2 * 5 * 4 * 6


def test_a_kernel_is_counted_by_who_knows_it():
    text = one('f32[2]{0} custom-call(%p0), custom_call_target="tpu_custom_call"', "f32[2]{0}")
    assert cost(text).unknown == {"r"}
    assert cost(text, kernels=lambda name, operands: 7.0).flops == 7
    blocks = 3 * 512 * 512  # of 2 x 2, those on and below the diagonal
    shapes = [(1, 1, 1), (4, 1024, 128), (2, 1024, 128)]
    assert kernel_flops("splash_mha_fwd_segmented.2", shapes) == 2 * 2 * 4 * 128 * blocks
    assert kernel_flops("something", shapes) is None


def test_a_scan_of_products_as_compiled_here():
    def f(x, layers):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    text = jax.jit(f).lower(jnp.ones((128, 256)), jnp.ones((5, 256, 256))).compile().as_text()
    assert cost(text).flops == 5 * 2 * 128 * 256 * 256


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        cost("nothing")


def test_chips():
    assert {chip.name for chip in CHIPS} == set(TOPOLOGIES)
    for chip in CHIPS:
        assert 1e14 < chip.flops < 1e15 and chip.source.startswith("https://")
        assert 0.91 < chip.usable / chip.memory < 1.01
        assert 50 < chip.flops / chip.bandwidth < 1000 and chip.links < chip.bandwidth
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_bound_by_hand():
    chip = next(chip for chip in CHIPS if chip.name == "v5p")
    assert bound(chip, 459e12, 2 * 2765e9, 3 * 600e9) == dict(compute=1, memory=2, links=3)
    assert nearest(12, 5) == 4 and nearest(7, 5) == 7


@pytest.mark.parametrize("name", ["v5p-64", "v5e:3x3", "v9:2x2", "v5e", "v4:8x8"])
def test_an_unknown_topology(name):
    with pytest.raises(ValueError, match=rf"no topology '{name}'.*Known: v4: 2x2x1, .*v5e: 2x2, 2x4, 4x4"):
        topology(name)


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"v5e:2x4 needs libtpu.*opd_jax\[tpu\]"):
        topology("v5e:2x4")


def test_tracing_for_another_platform():
    assert platform() == jax.default_backend()
    with compiling_for("tpu"):
        assert platform() == "tpu"
    assert platform() == jax.default_backend()
