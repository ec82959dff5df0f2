"""`--target best`: how every parameter is rounded, chosen by what it costs in quality and gains in time.

float32, and each precision        -> engines -> their losses on one half of the held-out text
a precision beyond the budget      -> what rounding each parameter costs -> as many as needed get more bits -> engines
all these engines, side by side    -> their latencies -> the fastest within the budget
                                   -> its loss on the other half, which took no part in the choice

Parameters are rounded alike in all contexts, so that they share what they have in common; the budget limits the mean
over the contexts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cpcompile.bundle.reader import Bundle
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import MIXED, SEARCH_SECONDS, STANDARD_ROUNDED, BuildConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.measured import NotMeasured
from cpcompile.core.rounding import QUANTIZED, SCHEMES
from cpcompile.core.types import Array, Progress, Steps
from cpcompile.exporters.onnxruntime_exporter import variant_name
from cpcompile.exporters.openvino_exporter import variant_name as openvino_name
from cpcompile.machine.environment import available_cores
from cpcompile.passes.freeze import Frozen
from cpcompile.passes.quantized_parameters import NothingToRoundError
from cpcompile.passes.share_weights import Whole
from cpcompile.pipeline.cpu_engines import export_all_for_openvino, export_rounded
from cpcompile.report.contents import Candidate, PrecisionSearch
from cpcompile.runtime.availability import why_not_here
from cpcompile.runtime.engine import load_engine
from cpcompile.validation.language_reference import OTHERS, SEARCHED, LanguageReference
from cpcompile.validation.reference import Run
from cpcompile.validation.runners import engine_runner
from cpcompile.validation.sensitivity import rounding_costs
from cpcompile.validation.speed import measure_speed

FP32 = "fp32"
LEAST_WINDOWS = 8
"""Windows of held-out text that a context needs, so that either half has a standard error."""
CONFIDENCE = 3.0
"""Standard errors by which the increase has to stay below the budget.

Other text has an error of its own: where the increase is just within the budget on this half, it is so on another of
the same length 49 times in 50 (the error of the difference is 1.4 times that of one half).
"""
ROUNDS = 20
"""Of the timings, at most."""
PASSES = 2
"""Of the timings, of which the faster one counts: whatever disturbs the machine for some seconds only slows down."""
ATTEMPTS = 3
"""How often a mixture that its engine shows to be over the budget is given more bits."""
ONLY_ENGINES = NotMeasured("engines are compared with each other")

Schemes = Mapping[str, str]
"""Parameter -> the scheme by which it is rounded; the others stay in float32."""


@dataclass(frozen=True)
class _Tried:
    """Engines of all contexts in a bundle of their own, and what they cost in quality."""

    name: str
    variant: str
    precision: str
    schemes: Schemes
    bundle: Bundle
    increase: float
    """In nats per token over the dense baseline."""
    error: float


@dataclass(frozen=True)
class Best:
    """What `Search.best` chose; no schemes mean that its weights are not rounded."""

    variant: str
    precision: str
    schemes: Schemes
    record: PrecisionSearch


class Search:
    """The candidates of one model; used as a context manager, which removes their engines in the end."""

    def __init__(
        self,
        folder: Path,
        frozen: Mapping[str, Frozen],
        parameters: Mapping[str, Whole],
        reference: LanguageReference,
        metadata: Mapping[str, Any],
        config: BuildConfig,
        validation: ValidateConfig,
        progress: Progress,
    ) -> None:
        """folder: an empty one, in which candidates lie until the end. metadata: that of their bundle."""
        self._folder = folder
        self._frozen = frozen
        self._parameters = parameters
        self._reference = reference
        self._metadata = {**metadata, "tokenizers": {}}
        self._config = config
        self._budget = validation.max_perplexity_increase
        self._rounds = min(validation.rounds, ROUNDS)
        self._threads = validation.threads or available_cores()
        self._progress = progress
        self._bundles = ExitStack()
        self._tried: Sequence[_Tried] = ()
        self._remarks: list[str] = []
        self._dense = {c: reference.dense_window_losses(c, SEARCHED) for c in frozen}
        self._started = time.perf_counter()

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *error: object) -> None:
        self._bundles.close()
        self._folder.rmdir()

    def best(self, precisions: Sequence[str], openvino: Sequence[str] = ()) -> Best:
        """The fastest engines within the budget, of float32, `precisions` and mixtures of them.

        openvino: the precisions in which engines of OpenVINO are tried too, where they run here.
        """
        exact = self._try(FP32, FP32, {})
        tried = [exact]
        if self._config.standard_operators:  # blocks of weights have operators of ONNX Runtime alone
            precisions = [each for each in precisions if each in STANDARD_ROUNDED]
        for precision in precisions:
            try:
                tried.append(self._try(precision, precision, dict.fromkeys(self._parameters, precision)))
            except NothingToRoundError as error:
                self._remarks.append(f"{precision} was not tried: {error}")
        tried += [each for precision in openvino if (each := self._try_openvino(precision)) is not None]
        if self._holds(exact):
            over = [each for each in tried[1:] if each.schemes and not self._holds(each)]
            tried += [mixed for each in over if (mixed := self._mixture(each, precisions)) is not None]
        self._tried = tried
        latencies = self.latencies()
        fastest = min((each for each in tried if self._holds(each)), key=lambda e: latencies[e.name][1], default=exact)
        other, other_error = self._increase(
            {c: self._losses(fastest.bundle, fastest.variant, c, OTHERS) for c in self._frozen},
            {c: self._reference.dense_window_losses(c, OTHERS) for c in self._frozen},
        )
        windows = sum(len(losses) for losses in self._dense.values())
        record = PrecisionSearch(
            budget=self._budget,
            context=self._timed,
            tokens=windows * self._reference.sequence,
            candidates=tuple(self._described(each, *latencies[each.name]) for each in tried),
            chosen=fastest.name,
            reason="; ".join([self._reason(fastest, exact), *self._remarks]),
            other_increase=math.expm1(other),
            other_increase_error=other_error,
            seconds=time.perf_counter() - self._started,
        )
        return Best(fastest.variant, fastest.precision, fastest.schemes, record)

    def _try(self, name: str, precision: str, schemes: Schemes) -> _Tried:
        """Build engines, and measure them on the half of the text that is searched."""
        writer = self._bundles.enter_context(BundleWriter(self._folder / name))
        export_rounded(writer, self._frozen, self._parameters, schemes, precision, self._config, self._steps(name))
        bundle = writer.seal(name=name, metadata=self._metadata)
        return self._measured(name, variant_name(precision), precision, schemes, bundle)

    def _try_openvino(self, precision: str) -> _Tried | None:
        """The same for engines of OpenVINO; None if they do not run here."""
        name = openvino_name(precision)
        writer = self._bundles.enter_context(BundleWriter(self._folder / name))
        export_all_for_openvino(writer, self._frozen, self._parameters, precision, self._config)
        bundle = writer.seal(name=name, metadata=self._metadata)
        if (reason := why_not_here(bundle.variant(self._timed, name))) is not None:
            self._remarks.append(f"{name} was not tried: {reason}")
            return None
        return self._measured(name, name, precision, {}, bundle)

    def _measured(self, name: str, variant: str, precision: str, schemes: Schemes, bundle: Bundle) -> _Tried:
        steps, losses = self._steps(name), {}
        for done, context in enumerate(self._frozen, start=len(self._frozen)):
            steps(done, 0)
            losses[context] = self._losses(bundle, variant, context, SEARCHED)
        steps(2 * len(self._frozen), 0)
        return _Tried(name, variant, precision, schemes, bundle, *self._increase(losses, self._dense))

    def _steps(self, name: str) -> Steps:
        """Told of one step for every engine that is written, and one for every engine that is scored."""
        total = 2 * len(self._frozen)
        return lambda done, _: self._progress(f"search: {name}", done, total)

    def _losses(self, bundle: Bundle, variant: str, context: str, part: slice) -> Array:
        engine = load_engine(bundle, context, variant, threads=self._threads)
        return self._reference.window_losses(context, engine.outputs, part)

    def _increase(self, losses: Mapping[str, Array], dense: Mapping[str, Array]) -> tuple[float, float]:
        """The mean increase of the loss over the contexts in nats per token, and its standard error."""
        means, variances = [], []
        for context, own in losses.items():
            base = dense[context]
            paired = not self._reference.is_trimmed(context)
            noises = [own - base] if paired else [own, base]
            means.append(float(own.mean() - base.mean()))
            variances.append(sum(float(noise.var(ddof=1)) / len(noise) for noise in noises))
        return float(np.mean(means)), math.sqrt(sum(variances)) / len(means)

    def _holds(self, tried: _Tried) -> bool:
        return self._within(tried.increase, tried.error)

    def _within(self, increase: float, error: float) -> bool:
        return increase + CONFIDENCE * error <= math.log1p(self._budget)

    def _mixture(self, over: _Tried, precisions: Sequence[str]) -> _Tried | None:
        """Engines in the precision of `over`, but for as few parameters with more bits as hold the budget."""
        more = "int8-weights" if over.precision == "int4-weights" and "int8-weights" in precisions else FP32
        name = f"{over.precision}+{more}"
        if self._is_late:
            self._remarks.append(f"the time was over before {name} could be tried")
            return None
        rounded = {context: self._rounded(over, context) for context in self._frozen}
        steps = partial(self._progress, f"search: cost of {over.name}")
        costs = rounding_costs(self._reference, rounded, SCHEMES[over.precision], steps=steps)
        order = sorted(costs, key=lambda parameter: costs[parameter] / self._size(parameter), reverse=True)

        def mixed(count: int) -> Schemes:
            few = dict.fromkeys(order[count:], over.precision)
            return few if more == FP32 else few | dict.fromkeys(order[:count], more)

        def holds(count: int) -> bool:
            return self._within(*self._eager_increase(mixed(count), rounded))

        count = max(1, self._fewest(len(order), holds, name))
        for _ in range(ATTEMPTS):
            if count >= len(order):
                return None
            tried = self._try(name, MIXED, mixed(count))
            if self._holds(tried):
                return tried
            count += max(1, len(order) // 16)
        return tried

    def _fewest(self, most: int, holds: Callable[[int], bool], name: str) -> int:
        """The smallest count up to `most` that holds, by bisection; what holds is taken to go on holding.

        When the time is over, it is the smallest one that is known to hold.
        """
        low, high, done, total = 0, most, 0, math.ceil(math.log2(most + 1))
        while low < high and not self._is_late:
            self._progress(f"search: {name}", done, total)
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
            done += 1
        self._progress(f"search: {name}", total, total)
        return high

    def _eager_increase(self, schemes: Schemes, rounded: Mapping[str, Collection[str]]) -> tuple[float, float]:
        """The increase of the eager model with rounded parameters, which needs no engine."""
        losses = {}
        for context in self._frozen:
            own = {name: SCHEMES[schemes[name]] for name in rounded[context] if name in schemes}
            losses[context] = self._reference.window_losses(context, self._reference.masked(context, own), SEARCHED)
        return self._increase(losses, self._dense)

    @property
    def _is_late(self) -> bool:
        return time.perf_counter() - self._started > (self._config.search_seconds or SEARCH_SECONDS)

    def _rounded(self, tried: _Tried, context: str) -> list[str]:
        """The parameters that the engine of `context` has rounded."""
        graph = tried.bundle.variant(context, tried.variant).graph()
        return list(json.loads(graph.metadata_props.get(QUANTIZED, "{}")))

    def _size(self, parameter: str) -> int:
        return math.prod(self._parameters[parameter].shape)

    @property
    def _timed(self) -> str:
        """The context that keeps most parameters."""
        return max(self._frozen, key=lambda context: self._metadata["parameters"][context]["kept"])

    def latencies(self) -> dict[str, tuple[dict[str, float], float]]:
        """By candidate its latency in milliseconds by shape, and the geometric mean as a part of that in float32."""
        passes = [self._latencies(f"search: speed, {number} of {PASSES}") for number in range(1, PASSES + 1)]
        least = {
            name: {shape: min(each[name][shape] for each in passes) for shape in shapes}
            for name, shapes in passes[0].items()
        }
        exact = next(iter(least.values()))
        ratios = {name: [own[shape] / exact[shape] for shape in exact] for name, own in least.items()}
        return {name: (own, math.exp(float(np.mean(np.log(ratios[name]))))) for name, own in least.items()}

    def _latencies(self, stage: str) -> dict[str, dict[str, float]]:
        """By candidate and shape the median of one pass."""
        with ExitStack() as loaded:
            runs: dict[str, Run] = {}
            for each in self._tried:
                variant = each.bundle.variant(self._timed, each.variant)
                runs[each.name] = loaded.enter_context(engine_runner(variant, threads=self._threads).load())
            first, *others = runs
            speed = measure_speed(
                runs[first],
                ONLY_ENGINES,
                self._reference.timed(self._timed),
                rounds=self._rounds,
                threads=self._threads,
                peers={name: runs[name] for name in others},
                steps=partial(self._progress, stage),
            )
        assert not isinstance(speed.shapes, NotMeasured)
        return {
            name: {
                f"{shape.batch}x{shape.sequence}": shape.p50_ms if name == first else shape.peers[name].p50_ms
                for shape in speed.shapes
            }
            for name in runs
        }

    def _described(self, tried: _Tried, p50_ms: Mapping[str, float], relative_time: float) -> Candidate:
        rounded = {p: tried.schemes[p] for p in self._rounded(tried, self._timed)}
        bits = [self._bits(parameter, rounded.get(parameter)) for parameter in self._parameters]
        return Candidate(
            name=tried.name,
            precision=tried.precision,
            rounded={name: tuple(p for p in rounded if rounded[p] == name) for name in dict.fromkeys(rounded.values())},
            bits_per_weight=sum(bits) / sum(map(self._size, self._parameters)),
            bytes=max(tried.bundle.variant(context, tried.variant).bytes for context in self._frozen),
            increase=math.expm1(tried.increase),
            increase_error=tried.error,
            within_budget=self._holds(tried),
            p50_ms=p50_ms,
            relative_time=relative_time,
        )

    def _bits(self, parameter: str, scheme: str | None) -> float:
        size = self._size(parameter)
        return size * (32 if scheme is None else SCHEMES[scheme].bits_per_weight(self._parameters[parameter].shape[0]))

    def _reason(self, fastest: _Tried, exact: _Tried) -> str:
        if not self._holds(exact):
            return (
                f"not even float32 is surely within the budget: {_percent(exact)} against the dense baseline, "
                f"{self._budget:.1%} allowed; train longer, give more held-out text with --data, or allow more with "
                "--max-perplexity-increase"
            )
        if fastest is exact:
            return "nothing that is faster stays within the budget"
        return (
            f"the fastest within the budget: {_percent(fastest)} against the dense baseline, {self._budget:.1%} allowed"
        )


def _percent(tried: _Tried) -> str:
    return f"{math.expm1(tried.increase):+.2%} ± {CONFIDENCE * tried.error:.2%}"


def require_search_text(reference: LanguageReference, contexts: Iterable[str]) -> None:
    """UsageError unless every context has enough held-out text for a search."""
    for context in contexts:
        if (windows := reference.windows(context)) < LEAST_WINDOWS:
            raise UsageError(
                f"--target best compares engines on held-out text; {context} has {windows} windows of it, and "
                f"{LEAST_WINDOWS} are needed: give more text with --data, or name a precision with --target cpu"
            )
