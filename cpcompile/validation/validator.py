"""Measure every engine of a bundle against the eager model that it was compiled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from cpcompile.bundle.reader import Bundle, Variant
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Progress, Steps, unwatched
from cpcompile.machine.environment import available_cores
from cpcompile.machine.memory import ProcessMemory
from cpcompile.machine.noise import watch_machine
from cpcompile.report.results import (
    NO_RESULTS,
    Memory,
    PeerResult,
    Placement,
    Results,
    Speed,
    Throughput,
    VariantResult,
)
from cpcompile.runtime.availability import why_not_here
from cpcompile.runtime.plan import why_not_taken
from cpcompile.validation.comparison import (
    NOT_COMPARED,
    Compared,
    EngineComparison,
    compare_engine,
    compare_outputs,
    incomparable,
)
from cpcompile.validation.memory import compare_memory, compare_start, measure_engine
from cpcompile.validation.placement import measure_placement
from cpcompile.validation.reference import Reference, Run, Timed
from cpcompile.validation.runners import Runner, engine_runner
from cpcompile.validation.speed import measure_speed
from cpcompile.validation.throughput import ROUNDS, measure_throughput

STAGE = "validate"
Peers = Callable[[Variant], Sequence[Runner]]
"""What else is run along with an engine."""

NO_MEMORY = "memory measurements were switched off"
NO_SPEED = "speed measurements were switched off"
ON_GPU = "the engine runs on the GPU and the dense model on the CPU, which compares machines"

Processes: TypeAlias = tuple[ProcessMemory | NotMeasured, ProcessMemory | NotMeasured]
"""Memory and start of engine and eager dense model, each in its own process."""


def validate(
    bundle: Bundle,
    reference: Reference,
    config: ValidateConfig,
    *,
    peers: Peers = lambda _variant: (),
    kept: Results = NO_RESULTS,
    compared: Compared = NOT_COMPARED,
    progress: Progress | None = None,
) -> Results:
    """By context: parity, quality, memory, speed and placement of every engine in `bundle`; `peers` are timed with it.

    kept: results that are known, which are not measured again. compared: the parity and quality of engines, by context
    and name, where they are known.
    UsageError: the bundle is damaged or has a context that the reference does not have.
    CpcompileError: an engine cannot be loaded.
    """
    foreign = [context for context in bundle.contexts if context not in reference.contexts]
    if foreign:
        raise UsageError(
            f"{bundle.root}: has the context {foreign[0]!r}, the model {', '.join(reference.contexts)}; "
            "validate a bundle with the model that it was built from"
        )
    variants = [variant for context in bundle.contexts for variant in bundle.variants(context)]
    report = progress or (lambda _stage, _done, _total: None)
    threads = config.threads or available_cores()
    results: dict[str, tuple[VariantResult, ...]] = dict.fromkeys(bundle.contexts, ())
    with _torch_threads(threads):
        report(STAGE, 0, len(variants))
        for done, variant in enumerate(variants, start=1):
            known = next((each for each in kept.get(variant.context, ()) if each.name == variant.name), None)
            results[variant.context] += (
                replace(known, kept=True)
                if known is not None
                else _validate_variant(
                    bundle,
                    variant,
                    reference,
                    config,
                    peers(variant),
                    threads,
                    report,
                    compared.get((variant.context, variant.name)),
                ),
            )
            report(STAGE, done, len(variants))
    return results


def measure_again(
    bundle: Bundle, variant: Variant, reference: Reference, config: ValidateConfig, steps: Steps = unwatched
) -> tuple[Speed, Memory, str | None]:
    """Speed and memory of one engine alone, where `config` has them on, and what else the machine did meanwhile."""
    threads = config.threads or available_cores()
    with _torch_threads(threads):
        with watch_machine() as machine:
            speed, _ = _speed(variant, reference, (), config, threads, lambda _name: steps)
        memory = compare_memory(*_processes(bundle, variant, reference, threads, config))
        return speed, memory, machine.interference


def _validate_variant(
    bundle: Bundle,
    variant: Variant,
    reference: Reference,
    config: ValidateConfig,
    peers: Sequence[Runner],
    threads: int,
    progress: Progress,
    compared: EngineComparison | None,
) -> VariantResult:
    context = variant.context

    def part(name: str) -> Steps:
        return partial(progress, f"{STAGE}: {name} of {context} {variant.name}")

    bundle.verify_engine(variant)
    if (reason := why_not_here(variant)) is not None:
        return VariantResult.not_run(
            name=variant.name,
            runtime=variant.runtime,
            precision=variant.precision,
            status="built",
            reason=f"built, not run: {reason}",
            bytes=variant.bytes,
        )
    if compared is None:
        compared = compare_engine(bundle, variant, reference, config, threads=threads, part=part)
    results: tuple[PeerResult, ...] = ()
    if (failed := incomparable(compared.parity)) is not None:
        speed, throughput = Speed.without(failed.reason), Throughput.without(failed.reason)
        placement = Placement.without(failed.reason)
        processes: Processes = (failed, _dense_process(reference, context, config, threads))
    else:
        speed, results = _speed(variant, reference, peers, config, threads, part)
        throughput = _throughput(variant, reference, config, threads, part("throughput"))
        processes = _processes(bundle, variant, reference, threads, config, part("memory"))
        feeds = reference.timed(context)[0].feeds
        placement = measure_placement(variant, feeds)
    return VariantResult(
        name=variant.name,
        runtime=variant.runtime,
        precision=variant.precision,
        bytes=variant.bytes,
        status="ran",
        reason=None,
        parity=compared.parity,
        quality=compared.quality,
        memory=compare_memory(*processes),
        start=compare_start(*processes),
        speed=speed,
        throughput=throughput,
        placement=placement,
        peers=results,
    )


def _speed(
    variant: Variant,
    reference: Reference,
    peers: Sequence[Runner],
    config: ValidateConfig,
    threads: int,
    part: Callable[[str], Steps] = lambda _name: unwatched,
) -> tuple[Speed, tuple[PeerResult, ...]]:
    """Engine, eager model and those of `peers` that can be loaded, timed together; with the parity of the peers."""
    if not config.speed:
        return Speed.without(NO_SPEED), ()
    context, results, runs = variant.context, [], {}
    inputs = _timed(variant, reference)
    if isinstance(inputs, NotMeasured):
        return Speed.without(inputs.reason), ()
    with ExitStack() as loaded:
        for peer in peers:
            try:
                run = loaded.enter_context(peer.load())
                run(inputs[0].feeds)
            except Exception as error:  # compilers and runtimes raise classes of their own
                reason = str(error) if isinstance(error, CpcompileError) else f"{type(error).__name__}: {error}"
                results.append(PeerResult(name=peer.name, computes=peer.computes, status="skipped", reason=reason))
                continue
            runs[peer.name] = run
            same = peer.computes == "context"
            steps = part(f"{peer.name}, parity")
            parity = compare_outputs(run, reference, context, config, steps=steps) if same else None
            results.append(PeerResult(name=peer.name, computes=peer.computes, status="ran", parity=parity))
        speed = measure_speed(
            loaded.enter_context(engine_runner(variant, threads=threads).load()),
            _dense(variant, reference),
            inputs,
            rounds=config.rounds,
            threads=threads,
            least_ratio=config.min_speed_ratio,
            peers=runs,
            steps=part("speed"),
        )
    return speed, tuple(results)


def _throughput(
    variant: Variant, reference: Reference, config: ValidateConfig, workers: int, steps: Steps
) -> Throughput:
    """Throughput with one concurrent request per thread."""
    if not config.speed:
        return Throughput.without(NO_SPEED)
    inputs, dense = _timed(variant, reference), _dense(variant, reference)
    if isinstance(inputs, NotMeasured):
        return Throughput.without(inputs.reason)
    feeds = inputs[0].feeds
    with engine_runner(variant, threads=1, workers=workers).load() as engine, _torch_threads(1):
        eager = dense if isinstance(dense, NotMeasured) else partial(dense, feeds)
        rounds = min(config.rounds, ROUNDS)
        return measure_throughput(partial(engine, feeds), eager, workers=workers, rounds=rounds, steps=steps)


def _processes(
    bundle: Bundle,
    variant: Variant,
    reference: Reference,
    threads: int,
    config: ValidateConfig,
    steps: Steps = unwatched,
) -> Processes:
    """Engine and eager dense model, each in a process of its own."""
    if not config.memory:
        return NotMeasured(NO_MEMORY), NotMeasured(NO_MEMORY)
    steps(0, 2)
    dense = _dense_process(reference, variant.context, config, threads)
    inputs = _timed(variant, reference)
    if isinstance(inputs, NotMeasured):
        return inputs, dense
    steps(1, 2)
    engine = measure_engine(bundle.root, variant.context, variant.name, inputs[0].feeds, threads=threads)
    steps(2, 2)
    return engine, dense


def _timed(variant: Variant, reference: Reference) -> Sequence[Timed] | NotMeasured:
    """The shapes that `variant` takes."""
    inputs = reference.timed(variant.context)
    reasons = [why_not_taken(variant, timed.feeds) for timed in inputs]
    taken = [timed for timed, reason in zip(inputs, reasons, strict=True) if reason is None]
    return taken or NotMeasured(str(reasons[0]))


def _dense(variant: Variant, reference: Reference) -> Run | NotMeasured:
    """What the speed of `variant` is compared with."""
    return reference.dense(variant.context) if variant.on_cpu else NotMeasured(ON_GPU)


def _dense_process(
    reference: Reference, context: str, config: ValidateConfig, threads: int
) -> ProcessMemory | NotMeasured:
    return reference.dense_memory(context, threads=threads) if config.memory else NotMeasured(NO_MEMORY)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
