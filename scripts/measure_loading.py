"""Measures the host memory that `models.load` takes on a mesh of virtual CPU devices.

    python scripts/measure_loading.py                       # sizes of Llama-3.2-1B, bfloat16, 8 devices
    python scripts/measure_loading.py --layers 4 --fsdp 4 --tensor 2

Writes a random checkpoint of those sizes into a temporary folder and loads it in a process of its own, whose
/proc/PID/status is read every 2 ms. On virtual devices the model itself lies in the host's memory, so its
bytes are part of the figure. "anonymous" is RssAnon, what the process has allocated; "with pages of files" is
RssAnon + RssFile: the checkpoint is mapped, and its pages, which the kernel takes back when it needs them,
stay there as long as it does not. Both are over what the process had before `load`, where JAX had started and
the mesh stood. Exit status 1 if the anonymous peak is above 1.3 times the model's bytes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 1.3
SIZES = dict(
    vocab_size=128256,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=8192,
)
_LOADER = """
import sys, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]) * int(sys.argv[3]))
from flax import nnx
from opd_jax import models, parallel
import safetensors.numpy
mesh = parallel.make_mesh(fsdp=int(sys.argv[2]), tensor=int(sys.argv[3]))
jax.block_until_ready(jax.device_put(jax.numpy.zeros(8), parallel.batch_sharding(mesh)))
print("ready", flush=True)
sys.stdin.readline()
model = models.load(sys.argv[1], mesh=mesh)
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
print(sum(leaf.nbytes for leaf in leaves), flush=True)
"""


def make_checkpoint(folder: Path, sizes: dict[str, int]) -> None:
    """A Llama of these sizes with random bfloat16 weights, in files of at most 1 GiB."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from opd_jax import models

    hf = dict(architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, rope_theta=5e5)
    hf |= dict(head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True, hidden_act="silu") | sizes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    graphdef, shapes = nnx.split(models.abstract(models.load_config(folder), jnp.bfloat16))
    rng = np.random.default_rng(0)

    def fill(leaf):
        bits = rng.integers(0x3C00, 0x3F00, leaf.shape, np.uint16)  # 0.008 to 0.5
        return leaf.replace(jnp.asarray(bits.view(jnp.bfloat16)))

    params = nnx.from_flat_state([(path, fill(leaf)) for path, leaf in nnx.to_flat_state(shapes)])
    models.save(nnx.merge(graphdef, params), folder, max_shard_bytes=2**30)


def measure(folder: Path, fsdp: int, tensor: int) -> dict[str, float]:
    """Bytes of the model, and what loading it took at its peak: anonymous, and with pages of files."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", _LOADER, str(folder), str(fsdp), str(tensor)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the loading process ended with status {child.wait()}")
        before = _status(child.pid)
        start, anonymous, resident = time.perf_counter(), 0, 0
        child.stdin.write("go\n")
        child.stdin.flush()
        while now := _status(child.pid):
            anonymous = max(anonymous, now["RssAnon"] - before["RssAnon"])
            resident = max(resident, sum(now[k] - before[k] for k in ("RssAnon", "RssFile")))
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        size = int(child.stdout.readline() or 0)
    if child.returncode or not size:
        raise RuntimeError(f"the loading process ended with status {child.returncode}")
    return dict(model=size, anonymous=anonymous, resident=resident, seconds=seconds, before=before["RssAnon"])


def _status(pid: int) -> dict[str, int]:
    """Bytes of each kind that a process has; nothing once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(kib) * 1024 for name, kib in re.findall(r"(Rss\w+):\s+(\d+) kB", text)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in SIZES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help="default %(default)s"
        )
    parser.add_argument("--fsdp", type=int, default=8, help="default %(default)s")
    parser.add_argument("--tensor", type=int, default=1, help="default %(default)s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "model", {name: getattr(given, name) for name in SIZES})
        found = measure(Path(folder) / "model", given.fsdp, given.tensor)
    share, gib = found["anonymous"] / found["model"], {key: size / 2**30 for key, size in found.items()}
    print(
        f"{given.fsdp * given.tensor} devices (fsdp {given.fsdp} x tensor {given.tensor}): "
        f"{gib['model']:.2f} GiB of weights; peak while loading {gib['anonymous']:.2f} GiB "
        f"anonymous = {share:.2f} x, with pages of files {found['resident'] / found['model']:.2f} x; "
        f"{gib['before']:.2f} GiB before; {found['seconds']:.1f} s"
    )
    return int(share > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
