"""What the programs of a config need of each device, found by compiling them; nothing runs or is loaded."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from opd_jax import models, parallel
from opd_jax.config import Config, MeshConfig
from opd_jax.models._attention import kernel_flops
from opd_jax.parallel import make_mesh
from opd_jax.parallel._chips import Chip, StandIns, bound, chip_of
from opd_jax.parallel._cost import Cost, cost
from opd_jax.training import _plan_advice
from opd_jax.training._layout import check_rows, check_split
from opd_jax.training._memory import shard_bytes
from opd_jax.training._plan_by_hand import need
from opd_jax.training._plan_programs import Program, Shapes, programs, shapes

_GIB = 2.0**30


@dataclasses.dataclass
class ProgramPlan:
    """One program on one device; bytes and FLOPs of one step.

    Attributes:
        name, runs: see `Program`.
        compile_seconds: how long XLA took.
        arguments, temporaries, outputs: bytes; outputs that reuse arguments' memory do not count.
        others: bytes of the run's arrays that lie there meanwhile and are no arguments, or are not used.
        peak: all of these together; None if XLA refused the program.
        needs: bytes that XLA says the program would need, where it refused; None: it was not asked.
        limit: bytes that the chip has for programs, or None.
        fits: whether peak is below; None: not known.
        flops: of matrix products, recomputation included.
        useful: FLOPs that the mathematics needs, divided evenly.
        bytes: moved from and to the main memory.
        collectives: kind: [how often, bytes sent].
        intensity: flops / bytes.
        seconds: least time for compute, memory and links.
        bound: the largest of them; None where no figures of the chip are known.
        bottleneck: its name.
        unknown: kernels whose FLOPs are not counted.
        advice: what would help.
        by_hand: nothing was compiled: memory is added up, bytes moved and collectives are not counted.
    """

    name: str
    runs: int = 1
    compile_seconds: float = 0.0
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    others: int = 0
    peak: int | None = None
    needs: float | None = None
    limit: float | None = None
    fits: bool | None = None
    flops: float = 0.0
    useful: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    intensity: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    bound: float | None = None
    bottleneck: str = ""
    unknown: list[str] = dataclasses.field(default_factory=list)
    advice: str = ""
    by_hand: bool = False


@dataclasses.dataclass
class Plan:
    """A config on a mesh.

    Attributes:
        devices: how many.
        kind: what JAX calls them.
        chip: their published figures, or None.
        mesh: sizes of the axes.
        batch_size, micro_batches: rows.
        prompt_width: tokens that prompts are padded to.
        programs: in the order of a step.
    """

    devices: int
    kind: str
    chip: Chip | None
    mesh: dict[str, int]
    batch_size: int
    micro_batches: int
    prompt_width: int
    programs: list[ProgramPlan]

    @property
    def fits(self) -> bool | None:
        """None where a program's peak has no limit to be compared with."""
        known = [each.fits for each in self.programs]
        return None if None in known else all(known)

    @property
    def bound(self) -> float | None:
        """Least seconds of a step; None where one is not known."""
        known = [each.bound for each in self.programs]
        return None if None in known else sum(known)


def plan(
    config: Config,
    devices: Sequence[Any],
    *,
    prompt_tokens: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    keep: dict[str, ProgramPlan] | None = None,
) -> Plan:
    """Compiles the programs of a config for devices that need not be there.

    Args:
        config: of a run; weights and data are not read.
        devices: of `parallel.topology`, or `jax.devices()`.
        prompt_tokens: of the longest prompt; None: data.max_prompt_length.
        progress: is told which program compiles.
        keep: plans of programs that need not be compiled again, by name.

    Raises:
        ValueError: if mesh, batch and models do not fit together.
    """
    config.validate()
    device = devices[0]
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    check_rows(config, mesh)
    for path in _paths(config):
        for notice in check_split(path, mesh):
            progress(notice)
    stands = devices.chip if isinstance(devices, StandIns) else None
    chip, kind = stands or chip_of(device), stands.kinds[0] if stands else device.device_kind
    found: list[ProgramPlan] = []
    with parallel.compiling_for("gpu" if stands else device.platform):
        run = shapes(config, mesh, prompt_tokens)
        compiled = None
        for program in programs(run):
            if keep and program.name in keep:
                found.append(keep[program.name])
                continue
            if program.name == "decode" and found[-1].peak is None:  # it starts from what prefill makes
                found.append(_refused(ProgramPlan("decode", others=found[-1].others), chip))
                continue
            progress(f"{'lowering' if stands else 'compiling'} {program.name} for {len(devices)} x {kind}")
            if stands:
                one = _add_up(program, run, chip)
            else:
                one, compiled = _compile(program, run, chip, compiled)
            found.append(one)
    for one in found:
        one.advice = _plan_advice.advice(one, run)
    return Plan(
        len(devices), kind, chip, dict(mesh.shape),
        config.batch_size, config.micro_batches, run.prompt_width, found,
    )  # fmt: skip


def search(
    config: Config,
    devices: Sequence[Any],
    *,
    prompt_tokens: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Plan]:
    """Plans of the splits and micro-batches that divide everything; those that fit first, then by bound."""
    plans: list[Plan] = []
    kept: dict[int, dict[str, ProgramPlan]] = {}
    for candidate in candidates(config, len(devices)):
        tensor, parts = candidate.mesh.tensor, candidate.micro_batches
        progress(f"mesh.fsdp {candidate.mesh.fsdp} x mesh.tensor {tensor}, micro_batches {parts}")
        keywords = dict(prompt_tokens=prompt_tokens, progress=progress, keep=kept.get(tensor))
        plans.append(plan(candidate, devices, **keywords))
        kept[tensor] = {p.name: p for p in plans[-1].programs if p.name in ("prefill", "decode")}
    if not plans:
        raise ValueError(
            f"no split of {len(devices)} devices divides the models and batch_size {config.batch_size}"
        )
    return sorted(plans, key=lambda p: (p.fits is False, p.bound if p.bound is not None else float("inf")))


def candidates(config: Config, count: int) -> Iterator[Config]:
    """The config with every split of `count` devices over fsdp and tensor, and 1, 2, 4, ... micro-batches."""
    sizes = [models.load_config(path) for path in _paths(config)]
    for tensor in (1, 2, 4, 8, 16):
        fsdp, rest = divmod(count, tensor)
        whole = (
            (s.kv_heads % tensor, s.vocab_size % tensor, s.ff_width % tensor, s.width % (fsdp or 1))
            for s in sizes
        )
        if rest or any(map(any, whole)) or config.rollout_batch % (fsdp or 1):
            continue
        parts = 1
        while config.batch_size % (parts * fsdp) == 0:
            yield dataclasses.replace(
                config, mesh=MeshConfig(data=1, fsdp=fsdp, tensor=tensor), micro_batches=parts
            )
            parts *= 2


def _compile(program: Program, run: Shapes, chip: Chip | None, before: Any) -> tuple[ProgramPlan, Any]:
    one = _begin(program, run)
    start = time.perf_counter()
    try:
        compiled = program.lower(before).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        one.compile_seconds = time.perf_counter() - start
        one.needs = _needed(str(error))
        return _refused(one, chip), before
    one.compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    one.arguments, one.temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # What XLA drops, such as a teacher's layers, is there all the same.
    one.others += max(program.argument_bytes - one.arguments, 0)
    one.outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    _compare(one, chip)
    counted = cost(compiled.as_text(), kernels=_kernels, loops=program.repeats)
    _price(one, counted, chip)
    return one, compiled


def _add_up(program: Program, run: Shapes, chip: Chip) -> ProgramPlan:
    """Lowers a program, which shows that it can be, and adds up by hand what it needs."""
    one = _begin(program, run)
    program.lower(None)
    needs = need(program, run)
    one.arguments, one.temporaries, one.outputs = map(round, needs[:3])
    _compare(one, chip)
    one.flops, one.by_hand = needs.flops, True
    one.seconds, one.bottleneck = dict(compute=one.flops / chip.flops), "compute"
    one.bound = one.seconds["compute"]
    return one


def _begin(program: Program, run: Shapes) -> ProgramPlan:
    one = ProgramPlan(program.name, runs=program.runs, useful=program.useful / run.mesh.size)
    arguments = {id(leaf) for leaf in jax.tree.leaves(program.arguments)}
    one.others = sum(shard_bytes(leaf) for leaf in run.resident if id(leaf) not in arguments)
    return one


def _compare(one: ProgramPlan, chip: Chip | None) -> None:
    one.peak = one.arguments + one.temporaries + one.outputs + one.others
    one.limit = chip.usable * _GIB if chip else None
    one.fits = one.peak <= one.limit if one.limit else None


def _price(one: ProgramPlan, counted: Cost, chip: Chip | None) -> None:
    one.flops, one.bytes = one.runs * counted.flops, one.runs * counted.bytes
    one.collectives = {kind: [one.runs * n for n in found] for kind, found in counted.collectives.items()}
    one.unknown = sorted(counted.unknown)
    one.intensity = counted.flops / counted.bytes if counted.bytes else 0.0
    if chip is not None:
        one.seconds = bound(chip, one.flops, one.bytes, one.runs * counted.sent)
        one.bottleneck = max(one.seconds, key=one.seconds.get)
        one.bound = one.seconds[one.bottleneck]


def _refused(one: ProgramPlan, chip: Chip | None) -> ProgramPlan:
    one.limit, one.fits = chip.usable * _GIB if chip else None, False
    return one


def _needed(message: str) -> float:
    """Bytes that XLA wanted, by its message."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)|[Uu]sed ([\d.]+)([KMGT]) of", message)
    if found is None:
        return float("nan")
    size, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(size) * 1024.0 ** (1 + "KMGT".index(unit))


def _kernels(name: str, operands: list) -> float | None:
    return kernel_flops(name, [shape.dims for shape in operands])


def _paths(config: Config) -> list[str]:
    paths = [config.student.path, *(teacher.path for teacher in config.all_teachers.values())]
    return [*paths, config.reference.path] if config.reference.path else paths
