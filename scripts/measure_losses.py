"""Measures memory and time of the fused losses against the dense ones.

    python scripts/measure_losses.py memory            # compiled program's memory analysis, full size
    python scripts/measure_losses.py rss               # measured peak of one run each, own processes
    python scripts/measure_losses.py time              # interleaved medians where dense fits

Times are CPU seconds of the process, which hold on a busy machine; wall seconds stand beside them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp

from opd_jax import losses

FULL = dict(tokens=4096, width=1024, vocabulary=151936)


def make(form: str, divergence: str, chunk: int):
    """The compiled-to-be loss and its gradients in the student's hidden states and kernel."""
    compare = getattr(losses, divergence)

    def loss(hidden, kernel, teacher_hidden, teacher_kernel, weights):
        inputs = (hidden, kernel, teacher_hidden, teacher_kernel)
        if form == "fused_sum":
            return losses.fused_sum(compare, weights, *inputs, chunk=chunk)[0]
        if form == "fused":
            return jnp.sum(weights * losses.fused(compare, *inputs, chunk=chunk))
        return jnp.sum(weights * compare(*(losses.log_softmax(_product(*pair)) for pair in _pairs(inputs))))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def _pairs(inputs):
    return inputs[:2], inputs[2:]


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def shapes(size, dtype):
    tokens, width, vocabulary = size["tokens"], size["width"], size["vocabulary"]
    made = [jax.ShapeDtypeStruct(s, dtype) for s in [(tokens, width), (width, vocabulary)] * 2]
    return [*made, jax.ShapeDtypeStruct((tokens,), jnp.float32)]


def random_inputs(size, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    *models, weights = shapes(size, dtype)
    inputs = [0.2 * jax.random.normal(k, s.shape, dtype) for k, s in zip(keys, models, strict=True)]
    return [*inputs, jnp.full(weights.shape, 1 / weights.size, jnp.float32)]


def memory(size, dtype, form, divergence, chunk):
    compiled = make(form, divergence, chunk).lower(*shapes(size, dtype)).compile()
    found = compiled.memory_analysis()
    floor = found.argument_size_in_bytes + found.output_size_in_bytes
    one = 4 * min(chunk, size["tokens"]) * size["vocabulary"]
    total = floor + found.temp_size_in_bytes
    print(
        f"{form:9} {divergence:12} chunk {chunk:4} {dtype}: inputs and gradients {floor / 2**30:.2f} GiB,"
        f" chunk {one / 2**30:.3f}, temporary {found.temp_size_in_bytes / 2**30:.2f}"
        f" -> {total / (floor + one):.3f}"
        " x (inputs + gradients + one chunk)",
        flush=True,
    )


def peak_rss() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def rss_child(size, dtype, form, divergence, chunk):
    inputs = jax.block_until_ready(random_inputs(size, dtype))
    step = make(form, divergence, chunk).lower(*inputs).compile()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak to what is resident now
    before = peak_rss()
    start, cpu = time.time(), time.process_time()
    value, gradients = jax.block_until_ready(step(*inputs))
    report = dict(wall=time.time() - start, cpu=time.process_time() - cpu, value=float(value))
    report |= dict(before=before, peak=peak_rss())
    report["inputs"] = sum(a.nbytes for a in inputs)
    report["gradients"] = sum(a.nbytes for a in gradients)
    print(json.dumps(report))


def rss(size, dtype, form, divergence, chunk):
    command = [sys.executable, __file__, "rss-child", "--form", form, "--divergence", divergence]
    command += ["--chunk", str(chunk), "--dtype", str(dtype)]
    command += [f"--{name}={value}" for name, value in size.items()]
    report = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    one = 4 * min(chunk, size["tokens"]) * size["vocabulary"]
    floor = report["inputs"] + report["gradients"]
    used = report["inputs"] + report["peak"] - report["before"]
    print(
        f"{form:9} {divergence:12} chunk {chunk:4} {dtype}: peak RSS {report['peak'] / 2**30:.2f} GiB, of it"
        f" {used / 2**30:.2f} for inputs, gradients and the computation = {used / (floor + one):.3f} x"
        f" (inputs + gradients + one chunk); {report['cpu']:.0f} s CPU, {report['wall']:.0f} s wall,"
        f" loss {report['value']:.6f}",
        flush=True,
    )


def timing(size, dtype, forms, divergence, chunk, repeats):
    inputs = random_inputs(size, dtype)
    steps = {form: make(form, divergence, chunk) for form in forms}
    for step in steps.values():
        jax.block_until_ready(step(*inputs))
    cpu, wall = ({form: [] for form in forms} for _ in range(2))
    for _ in range(repeats):
        for form, step in steps.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(step(*inputs))
            wall[form].append(time.perf_counter() - start)
            cpu[form].append(time.process_time() - start_cpu)
    base = statistics.median(cpu["dense"]), statistics.median(wall["dense"])
    for form in forms:
        medians = statistics.median(cpu[form]), statistics.median(wall[form])
        print(
            f"{form:9} {divergence:12} chunk {chunk:4} {dtype} {tuple(size.values())}: {medians[0]:.2f} s CPU"
            f" ({medians[0] / base[0]:.2f} x dense), {medians[1]:.2f} s wall ({medians[1] / base[1]:.2f} x)",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["memory", "rss", "rss-child", "time"])
    parser.add_argument("--form", default="fused,fused_sum,dense")
    parser.add_argument("--divergence", default="reverse_kl")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    given = parser.parse_args()
    size = {name: getattr(given, name) for name in FULL}
    dtype, forms = jnp.dtype(given.dtype), given.form.split(",")
    for divergence in given.divergence.split(","):
        if given.what == "time":
            timing(size, dtype, sorted({*forms, "dense"}), divergence, given.chunk, given.repeats)
            continue
        for form in forms:
            function = {"memory": memory, "rss": rss, "rss-child": rss_child}[given.what]
            function(size, dtype, form, divergence, size["tokens"] if form == "dense" else given.chunk)


if __name__ == "__main__":
    main()
