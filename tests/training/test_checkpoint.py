"""Round trips, and every kind of damage: a restored state is right, or there is none."""

import gc
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opd_jax.parallel import make_mesh, param_shardings
from opd_jax.training import _checkpoint
from opd_jax.training._checkpoint import CheckpointError, Checkpoints, checksums
from opd_jax.training._optimizer import init_optimizer

# Orbax drops the coroutines of a read that failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Mixed(NamedTuple):
    params: dict
    nested: tuple


def mixed(seed=0) -> Mixed:
    """Every dtype that a run may hold, scalars and special values included."""
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)
    return Mixed(
        params={
            "float32": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
            "bfloat16": jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.bfloat16),
            "special": jnp.asarray(special),
        },
        nested=(
            optax.ScaleByAdamState(
                count=jnp.asarray(7 + seed, jnp.int32),
                mu={"a.b": jnp.asarray(rng.normal(size=9), jnp.float16)},
                nu=[jnp.asarray(rng.integers(0, 255, 6), jnp.uint8)],
            ),
            jnp.asarray(rng.random(11) < 0.5),
            jax.random.key_data(jax.random.key(seed)),
        ),
    )


def bits(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]
    assert [x.shape for x in jax.tree.leaves(a)] == [x.shape for x in jax.tree.leaves(b)]
    assert bits(a) == bits(b)


@pytest.fixture
def open_checkpoints():
    """Opens checkpoints and closes them at the end of the test."""
    opened = []

    def make(folder, keep=2):
        opened.append(Checkpoints(folder, keep))
        return opened[-1]

    yield make
    for each in opened:
        each.close()
    gc.collect()  # so that what the reads dropped is reported here, not in a later test


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 5; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoints"
    checkpoints = Checkpoints(folder, 2)
    for step in (3, 5):
        checkpoints.save(step, mixed(step), {"step": step, "text": "ä", "nested": {"x": [1, None, 0.1]}})
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_round_trip(saved, open_checkpoints):
    checkpoints = open_checkpoints(saved)
    assert checkpoints.steps == [3, 5]
    step, state, record = checkpoints.restore(mixed())
    assert step == 5 and record == {"step": 5, "text": "ä", "nested": {"x": [1, None, 0.1]}}
    identical(state, mixed(5))


def test_a_template_without_values(saved, open_checkpoints):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), mixed())
    identical(open_checkpoints(saved).restore(like)[1], mixed(5))


def test_a_sharded_train_state(make_model, tmp_path, open_checkpoints):
    """nnx parameters and AdamW's state on a mesh, restored there, on another mesh and on one device."""
    _, params = nnx.split(make_model())
    optimizer = optax.adamw(1e-3)

    def state(mesh, seed):
        place = params if mesh is None else jax.device_put(params, param_shardings(params, mesh))
        made = place, init_optimizer(optimizer, place)
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda a: jax.device_put(np.asarray(a) + rng.normal(size=a.shape).astype(a.dtype), a.sharding),
            made,
        )

    mesh = make_mesh(2, 2, 2)
    before = state(mesh, 1)
    checkpoints = open_checkpoints(tmp_path / "c")
    checkpoints.save(1, before, {})
    checkpoints.wait()
    for place in (mesh, make_mesh(1, 8, 1), None):
        like = state(place, 2)
        _, got, _ = checkpoints.restore(like)
        identical(got, before)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_state_may_be_donated_while_it_is_written(tmp_path, open_checkpoints):
    """The step after a save overwrites the buffers that the writer may still be reading."""
    state = {"a": jnp.arange(500_000, dtype=jnp.float32), "b": jnp.ones((700, 700))}
    expected = jax.tree.map(np.array, state)
    change = jax.jit(lambda tree: jax.tree.map(lambda a: a * -3.0 + 1.0, tree), donate_argnums=0)
    change(jax.tree.map(jnp.copy, state))
    checkpoints = open_checkpoints(tmp_path / "c")
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = change(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    identical(checkpoints.restore(state)[1], expected)


def test_the_newest_are_kept(tmp_path, open_checkpoints):
    checkpoints = open_checkpoints(tmp_path / "c", keep=2)
    for step in (1, 4, 9):
        checkpoints.save(step, {"a": jnp.full(3, step)}, {"step": step})
    checkpoints.wait()
    assert checkpoints.steps == [4, 9]
    assert {p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()} == {"4", "9"}
    assert open_checkpoints(tmp_path / "c").restore({"a": jnp.zeros(3, int)})[0] == 9


def test_nothing_to_restore(tmp_path, open_checkpoints):
    checkpoints = open_checkpoints(tmp_path / "deep" / "c")
    assert checkpoints.steps == [] and checkpoints.restore(mixed()) is None


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_flipped_bits(saved, tmp_path, open_checkpoints, caplog):
    """Two bits of every file of the newest checkpoint, one at a time: it is restored right, or step 3 is."""
    rng, outcomes = np.random.default_rng(0), []
    for number, file in enumerate(files(saved / "5")):
        for which, place in enumerate((0, int(rng.integers(file.stat().st_size)))):
            folder = tmp_path / f"{number}-{which}"
            shutil.copytree(saved, folder)
            path = folder / file.relative_to(saved)
            data = bytearray(path.read_bytes())
            data[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            step, state, record = open_checkpoints(folder).restore(mixed())
            assert record["step"] == step
            identical(state, mixed(step))
            outcomes.append(step)
    assert outcomes.count(3) >= 3 and len(outcomes) > 10
    assert "trying the one before" in caplog.text


def array_files(folder):
    """Where the arrays' bytes are."""
    return [p for p in files(folder) if p.parent.name == "d"]


def test_flipped_bits_of_stored_arrays(tmp_path, open_checkpoints):
    """Incompressible data fills the file: every flip falls into it, and none is missed."""
    rng = np.random.default_rng(1)

    def make(seed):
        noise = np.random.default_rng(seed).normal(size=2000)
        return {"a": jnp.asarray(noise, jnp.float32), "b": jnp.asarray(noise, jnp.bfloat16)}

    folder = tmp_path / "c"
    checkpoints = Checkpoints(folder, 2)
    for step in (1, 2):
        checkpoints.save(step, make(step), {"step": step})
    checkpoints.wait()
    checkpoints.close()
    largest = max(array_files(folder / "2"), key=lambda p: p.stat().st_size)
    assert largest.stat().st_size > 3000
    for number in range(6):
        broken = tmp_path / str(number)
        shutil.copytree(folder, broken)
        path = broken / largest.relative_to(folder)
        data = bytearray(path.read_bytes())
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        step, state, _ = open_checkpoints(broken).restore(make(0))
        identical(state, make(step))


@pytest.mark.parametrize("kind", ["shortened", "emptied", "deleted"])
@pytest.mark.parametrize("what", ["record", "arrays", "metadata"])
def test_damaged_files(copied, open_checkpoints, kind, what):
    newest = copied / "5"
    chosen = {
        "record": [p for p in files(newest) if p.parent.name == "record"],
        "arrays": array_files(newest),
        "metadata": [p for p in files(newest) if p.name == "_METADATA"],
    }[what]
    assert chosen
    for path in chosen:
        if kind == "deleted":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if kind == "shortened" else 0])
    step, state, record = open_checkpoints(copied).restore(mixed())
    assert record["step"] == step
    identical(state, mixed(step))
    if what != "metadata":
        assert step == 3


def damage(folder, step):
    for path in array_files(folder / str(step)):
        path.write_bytes(path.read_bytes()[:-5])


def test_after_damage_the_run_goes_on(copied, open_checkpoints):
    """The damaged step is moved away, written again by the run, and may be damaged a second time."""
    for _ in range(2):
        damage(copied, 5)
        checkpoints = open_checkpoints(copied)
        assert checkpoints.restore(mixed())[0] == 3
        assert checkpoints.steps == [3]
        checkpoints.save(5, mixed(5), {"step": 5})
        checkpoints.wait()
        assert checkpoints.steps == [3, 5]
        step, state, _ = checkpoints.restore(mixed())
        assert step == 5
        identical(state, mixed(5))


def test_all_damaged(copied, open_checkpoints):
    before = sorted(p.name for p in copied.iterdir())
    for step in (3, 5):
        damage(copied, step)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read: step 5: .*step 3: "
    ) as error:
        open_checkpoints(copied).restore(mixed())
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in copied.iterdir()) == before  # nothing is moved or lost


def test_a_lost_peer_is_no_damage(copied, open_checkpoints, monkeypatch):
    """With several processes, what `together` did not settle has broken the messages between them."""
    checkpoints, before = open_checkpoints(copied), sorted(p.name for p in copied.iterdir())

    def gone(*_):
        raise RuntimeError("UNAVAILABLE: connection closed by peer")

    monkeypatch.setattr(_checkpoint.parallel, "several", lambda: True)
    monkeypatch.setattr(_checkpoint.parallel, "together", gone)
    for call in (lambda: checkpoints.restore(mixed()), checkpoints.check):
        with pytest.raises(RuntimeError, match="UNAVAILABLE") as error:
            call()
        assert not getattr(error.value, "everywhere", False)
    assert sorted(p.name for p in copied.iterdir()) == before


def test_a_full_disk(copied, open_checkpoints, monkeypatch):
    checkpoints = open_checkpoints(copied)
    usage = shutil.disk_usage(copied)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"no room for the checkpoint of step 6 in .*checkpoints: it takes"
    ):
        checkpoints.save(6, mixed(6), {"step": 6})
    monkeypatch.undo()
    assert checkpoints.restore(mixed())[0] == 5
    checkpoints.save(6, mixed(6), {"step": 6})  # and once there is room
    checkpoints.wait()
    assert checkpoints.steps == [5, 6]


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_another_state_than_was_saved(copied, open_checkpoints, change):
    """Another model or optimiser: the message names the array, and nothing is moved."""
    like = mixed()
    if change == "missing":
        del like.params["special"]
    elif change == "extra":
        like.params["more"] = jnp.zeros(3)
    elif change == "shape":
        like.params["float32"] = jnp.zeros((7, 5))
    else:
        like.params["float32"] = jnp.zeros((5, 7), jnp.bfloat16)
    before = sorted(p.name for p in copied.iterdir())
    message = {
        "missing": r"it has float32\[7\] as params.special, this run needs nothing",
        "extra": r"it has nothing as params.more, this run needs float32\[3\]",
        "shape": r"it has float32\[5, 7\] as params.float32, this run needs float32\[7, 5\]",
        "dtype": r"it has float32\[5, 7\] as params.float32, this run needs bfloat16\[5, 7\]",
    }[change]
    with pytest.raises(CheckpointError, match=f"another model or optimizer: {message}"):
        open_checkpoints(copied).restore(like)
    assert sorted(p.name for p in copied.iterdir()) == before


def test_checksums_see_every_single_bit_and_every_swap():
    data = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    start = int(checksums({"a": jnp.asarray(data)})["a"])
    seen = set()
    for bit in range(data.nbytes * 8):
        flipped = bytearray(data.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(flipped), np.float32).reshape(3, 4)
        seen.add(int(checksums({"a": jnp.asarray(changed)})["a"]))
    assert start not in seen
    swapped = data.copy()
    swapped[0, 1], swapped[2, 3] = data[2, 3], data[0, 1]
    assert int(checksums({"a": jnp.asarray(swapped)})["a"]) != start


def test_checksums_do_not_depend_on_sharding():
    data = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = make_mesh(2, 2, 2)
    spread = jax.device_put(
        data, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    )
    assert checksums({"a": spread})["a"] == checksums({"a": jnp.asarray(data)})["a"]
