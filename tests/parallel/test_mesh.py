import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from opd_jax import parallel


class Mesh:
    """As much of a mesh as the rules look at."""

    def __init__(self, **shape):
        self.shape = shape


EIGHT = Mesh(data=2, fsdp=2, tensor=2)


def test_one_device():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert parallel.batch_sharding(mesh).spec == P(("data", "fsdp"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=2, fsdp=2, tensor=2), "data=2 x fsdp=2 x tensor=2 needs 8 devices, but there"),
        (dict(tensor=3), "1 devices cannot be divided by the 3 that data=1, tensor=3 ask for"),
        (dict(data=0), "must be positive.*'data': 0"),
        (dict(tensor=-2), "must be positive.*'tensor': -2"),
        (dict(data=-1), "only one mesh axis can be -1; got data and fsdp"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(**sizes, devices=jax.devices()[:1])


def test_specs():
    rules = parallel.ShardingRules()
    assert rules.spec(("embed", "heads"), (16, 32), EIGHT) == P("fsdp", "tensor")
    assert rules.spec(("embed", "heads"), (3, 16, 32), EIGHT) == P(None, "fsdp", "tensor")
    assert rules.spec(("norm",), (3, 16), EIGHT) == P(None, None)
    assert rules.spec((), (3, 16), EIGHT) == P(None, None)


def test_what_does_not_divide_stays_whole():
    rules = parallel.ShardingRules(mlp=("fsdp", "tensor"), embed=None)
    assert rules.spec(("embed", "mlp"), (9, 24), EIGHT) == P(None, ("fsdp", "tensor"))
    assert rules.spec(("embed", "mlp"), (9, 18), EIGHT) == P(None, None)


@pytest.mark.parametrize(
    ("rules", "axes", "message"),
    [
        (dict(embed="tensor"), ("embed", "heads"), "0 and 1 would both be split over.*'tensor'"),
        (dict(embed=("fsdp", "fsdp")), ("embed", "heads"), "0 and 0 would both"),
        (dict(), ("embed", "head"), "unknown logical axis 'head'; known: vocab, embed"),
        (dict(heads="model"), ("embed", "heads"), "mesh has axes .*, not 'model'"),
        (dict(), ("embed", "heads", "mlp"), "do not fit an array of shape"),
    ],
)
def test_rules_that_are_wrong(rules, axes, message):
    with pytest.raises(ValueError, match=message):
        parallel.ShardingRules(**rules).spec(axes, (16, 32), EIGHT)


def test_sizes_that_do_not_divide_the_devices_are_told_the_nearest():
    with pytest.raises(ValueError, match=r"8 devices .* by the 9 .* nearest that works is data=2, tensor=2"):
        parallel.make_mesh(data=3, tensor=3, devices=jax.devices()[:8])
