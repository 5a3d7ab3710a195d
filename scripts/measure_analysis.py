"""Measures the analysis of checkpoints: time against a loop of SVDs, and memory.

    python scripts/measure_analysis.py pair DIR    # a 135M pair (30 layers, SmolLM2's shapes), all geometry
    python scripts/measure_analysis.py shapes      # spectra of single shapes, accuracy included
    python scripts/measure_analysis.py memory DIR  # peak of an 8B-shaped pair in bfloat16, 2 x 16 GB on disk

Weights are synthetic. Times are of interleaved rounds; CPU seconds stand beside wall seconds, which do not
mean much on a busy machine. `memory` repeats the values of one layer in all, and removes what it has written.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import ml_dtypes
import numpy as np

from opd_jax import analysis
from opd_jax.analysis._pool import available_cores, one_blas_thread

SMOLLM2 = dict(width=576, ff=1536, q=576, kv=192, vocabulary=49152, layers=30)
QWEN3_8B = dict(width=4096, ff=12288, q=4096, kv=1024, vocabulary=151936, layers=36)
RANK = 16


def shapes(size, layer):
    width, ff, q, kv = (size[name] for name in ("width", "ff", "q", "kv"))
    attention = zip("qkvo", [(q, width), (kv, width), (kv, width), (width, q)], strict=True)
    found = {f"self_attn.{name}_proj": shape for name, shape in attention}
    found |= {"mlp.gate_proj": (ff, width), "mlp.up_proj": (ff, width), "mlp.down_proj": (width, ff)}
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in found.items()}


def update_of(rng, shape):
    """A rank-16 update with a 1/i spectrum, and noise: what a short training leaves."""
    base = np.zeros(shape, np.float32)
    return np.subtract(*make_pair(rng, shape, np.float32, base)[::-1])


def make_pair(rng, shape, dtype, base=None):
    """A random matrix and an updated one, with no more than some rows of them in float64 at a time."""
    m, n = shape
    pair = [np.empty(shape, dtype) for _ in range(2)]
    u, v = rng.normal(size=(m, RANK)) / np.arange(1, RANK + 1) / m**0.5, rng.normal(size=(RANK, n))
    for i in range(0, m, 4096):
        part = slice(i, min(i + 4096, m))
        size = (part.stop - i, n)
        before = 0.02 * rng.standard_normal(size, np.float32) if base is None else base[part]
        pair[0][part] = before
        pair[1][part] = before + 1e-2 * u[part] @ v + 1e-5 * rng.standard_normal(size, np.float32)
    return pair


def write_pair(folder, size, dtype, *, shards, repeat):
    """base/ and tuned/ as Hugging Face folders; `repeat`: all layers hold the values of the first."""
    from safetensors.numpy import save_file

    rng, kept = np.random.default_rng(0), {}
    outer = {"model.embed_tokens.weight": (size["vocabulary"], size["width"])}
    if repeat:
        outer["lm_head.weight"] = (size["vocabulary"], size["width"])
    parts = np.array_split(np.arange(size["layers"]), shards)
    index = {name: {} for name in ("base", "tuned")}
    for number, layers in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        made = {"base": {}, "tuned": {}}
        wanted = dict(outer) if number == 0 else {}
        for layer in layers:
            wanted |= shapes(size, layer)
        for name, shape in wanted.items():
            key = ".".join(name.split(".")[3:]) if repeat and "layers" in name else name
            if key not in kept:
                pair = make_pair(rng, shape, dtype)
                if repeat and "layers" in name:
                    kept[key] = pair
            else:
                pair = kept[key]
            made["base"][name], made["tuned"][name] = pair
        for side, tensors in made.items():
            (folder / side).mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / side / file)
            index[side] |= dict.fromkeys(tensors, file)
    for side, weight_map in index.items():
        (folder / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / side / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))


def measures(dw, base):
    """What `MatrixGeometry` holds, by the definitions."""
    _, s, _ = np.linalg.svd(dw, full_matrices=False)
    s = s.astype(np.float64)
    p = s[s > 0] / s.sum()
    norm, rank = np.linalg.norm(dw.astype(np.float64)), int(np.sum(s > max(dw.shape) * 2.0**-23 * s[0]))
    counts = [int(np.ceil(f * rank - 1e-9)) for f in analysis.FRACTIONS]
    energy = [np.sum(s[:count] ** 2) / np.sum(s**2) for count in counts]
    base_norm = np.linalg.norm(base.astype(np.float64))
    return {
        "frobenius": norm,
        "relative": norm / base_norm if base_norm else np.nan,
        "spectral": s[0],
        "ratio": s[0] / norm,
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "top1_ratio": energy[analysis.FRACTIONS.index(0.01)] ** 0.5,
        "numerical_rank": rank,
    }


def loop(folder, embedding):
    """One numpy.linalg.svd with vectors a matrix, and the measures; read as plainly."""
    from safetensors.numpy import load_file

    found = {}
    for file in sorted((folder / "base").glob("*.safetensors")):
        base, tuned = load_file(file), load_file(folder / "tuned" / file.name)
        for name in base:
            if "embed" in name and not embedding:
                continue
            dw = tuned[name] - base[name]
            found[name] = measures(dw, base[name])
    return found


def loop_on_all_cores(folder, embedding):
    """The same with one matrix a thread."""
    from safetensors.numpy import load_file

    jobs = []
    for file in sorted((folder / "base").glob("*.safetensors")):
        base, tuned = load_file(file), load_file(folder / "tuned" / file.name)
        jobs += [tuned[n] - base[n] for n in base if embedding or "embed" not in n]
    with one_blas_thread(), ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(lambda dw: np.linalg.svd(dw, full_matrices=False)[1], jobs))


def timed(run):
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def pair(folder, rounds):
    folder = Path(folder)
    if not (folder / "tuned" / "config.json").exists():
        write_pair(folder, SMOLLM2, np.float32, shards=3, repeat=False)
    cache = folder / "cache"

    def ours():
        shutil.rmtree(cache, ignore_errors=True)
        return analysis.geometry(folder / "base", folder / "tuned", cache=cache)

    forms = {
        "loop of numpy.linalg.svd": lambda: loop(folder, True),
        "the same, a thread a core": lambda: loop_on_all_cores(folder, True),
        "geometry, empty cache": ours,
        "geometry, second call": lambda: analysis.geometry(folder / "base", folder / "tuned", cache=cache),
    }
    times = {name: [] for name in forms}
    for number in range(rounds):
        for name, form in forms.items():
            wall, cpu, result = timed(form)
            times[name].append((wall, cpu))
            if name.startswith("loop"):
                expected = result
            if isinstance(result, analysis.Geometry):
                found = result
        if number == 0:
            errors = [
                abs(getattr(r, measure) / value - 1)
                for r in found.records
                for measure, value in expected[r.name].items()
            ]
            print(f"{len(found.records)} matrices, largest relative difference {max(errors):.1e}", flush=True)
    median = {}
    for name, values in times.items():
        median[name] = [statistics.median(each[i] for each in values) for i in (0, 1)]
    wall0, cpu0 = median["loop of numpy.linalg.svd"]
    for name, (wall, cpu) in median.items():
        ratios = f"loop / this: wall {wall0 / wall:.1f}, CPU {cpu0 / cpu:.1f}"
        print(f"{name:28} wall {wall:7.2f} s  CPU {cpu:7.2f} s  {ratios}", flush=True)


def single_shapes(rounds):
    rng = np.random.default_rng(0)
    sizes = [(2, 2), (8, 8), (16, 64), (64, 64), (96, 256), (192, 576), (576, 576), (1536, 576), (576, 1536)]
    sizes += [(1024, 1024), (3072, 1024), (8192, 576), (2048, 2048)]
    for shape in sizes:
        many = max(1, min(200, 2_000_000 // (shape[0] * shape[1])))
        base = [np.zeros(shape, np.float32) for _ in range(many)]
        noisy = [update_of(rng, shape) for _ in base]
        sides = [(rng.normal(size=(shape[0], 3)), rng.normal(size=(3, shape[1]))) for _ in base]
        compare_shape("noisy", base, noisy, rounds)
        compare_shape("rank 3", base, [(a @ b).astype(np.float32) for a, b in sides], rounds)


def compare_shape(kind, base, updates, rounds):
    trees = [{f"x{i}": x for i, x in enumerate(each)} for each in (base, updates)]
    forms = {
        "svd": lambda: [np.linalg.svd(x, full_matrices=False)[1] for x in updates],
        "spectra": lambda: analysis.singular_values(np.stack(updates)),
        "measures": lambda: [measures(*pair) for pair in zip(updates, base, strict=True)],
        "geometry": lambda: analysis.geometry(*trees),
    }
    times = {name: [] for name in forms}
    found = {}
    for _ in range(rounds):
        for name, form in forms.items():
            wall, cpu, found[name] = timed(form)
            times[name].append((wall, cpu))
    wall, cpu = ({n: statistics.median(t[i] for t in ts) for n, ts in times.items()} for i in (0, 1))
    exact = np.stack(found["svd"]).astype(np.float64)
    error = np.abs(found["spectra"] - exact).max() / exact.max()
    m, n = base[0].shape
    print(
        f"{m:5} x {n:5} x {len(base):3} {kind:6}: svd {cpu['svd'] * 1e3 / len(base):9.3f} CPU ms each; "
        f"spectra {cpu['svd'] / cpu['spectra']:4.1f} x faster; "
        f"all measures {cpu['measures'] / cpu['geometry']:4.1f} x "
        f"(wall {wall['measures'] / wall['geometry']:4.1f} x); largest difference {error:.0e} s_1",
        flush=True,
    )


def memory(folder, layers, keep):
    folder = Path(folder)
    size = QWEN3_8B | {"layers": layers}
    layer = sum(m * n for m, n in shapes(size, 0).values())
    elements = 2 * size["vocabulary"] * size["width"] + layers * layer
    need = 4 * elements
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    print(f"{elements / 1e9:.2f}e9 parameters, a pair of {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    if need > 0.9 * free:
        raise SystemExit("too little room: fewer --layers")
    try:
        code = "import sys, measure_analysis as m; m.write_8b(sys.argv[1], int(sys.argv[2]))"
        run_child(code, folder, layers)
        run_child("import sys, measure_analysis as m; m.analyse_8b(sys.argv[1])", folder)
    finally:
        if not keep:
            shutil.rmtree(folder / "base", ignore_errors=True)
            shutil.rmtree(folder / "tuned", ignore_errors=True)


def run_child(code, *arguments):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, check=True)


def write_8b(folder, layers):
    size, shards = QWEN3_8B | {"layers": layers}, max(2, layers // 3)  # a shard of both is held in memory
    write_pair(Path(folder), size, ml_dtypes.bfloat16, shards=shards, repeat=True)


def analyse_8b(folder):
    folder = Path(folder)
    before = peak()
    with analysis.Bar() as bar:
        wall, cpu, found = timed(
            lambda: analysis.geometry(folder / "base", folder / "tuned", cache=folder / "cache", progress=bar)
        )
    print(
        f"{len(found.records)} matrices in {wall:.0f} s ({cpu:.0f} CPU s); peak {peak():.2f} GiB, of which "
        f"{before:.2f} before it began; largest tensor in float32 "
        f"{4 * max(r.shape[0] * r.shape[1] for r in found.records) / 2**30:.2f} GiB"
    )
    wall, _, again = timed(
        lambda: analysis.geometry(folder / "base", folder / "tuned", cache=folder / "cache")
    )
    print(f"second call {wall:.2f} s, equal: {again == found}; {found.mean()}")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["pair", "shapes", "memory"])
    parser.add_argument("folder", nargs="?", help="where to write the weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=36, help="of the 8B shape")
    parser.add_argument("--keep", action="store_true", help="leave the 8B weights on disk")
    options = parser.parse_args()
    if options.what == "shapes":
        return single_shapes(options.rounds)
    if options.folder is None:
        parser.error("give a folder")
    if options.what == "pair":
        return pair(options.folder, options.rounds)
    return memory(options.folder, options.layers, options.keep)


if __name__ == "__main__":
    main()
