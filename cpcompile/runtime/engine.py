"""Run the engines of a bundle with ONNX Runtime or OpenVINO, without torch and without experimental APIs.

engine = load_engine("model.cpc", "english")
logits = engine.run(input_ids)
"""

from __future__ import annotations

import importlib
import io
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from cpcompile.bundle.reader import CPU_PROVIDER, WEIGHTS_OPTION, Bundle, Variant, open_bundle
from cpcompile.core.cache import (
    IN_PLACE,
    INPUT,
    KEEP,
    MASK,
    OUTPUT,
    POSITIONS,
    PRESENT,
    complete,
    is_optional,
    present_of,
)
from cpcompile.core.coercion import coerce, require
from cpcompile.core.errors import CpcompileError, UsageError, first_line
from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Array, Feeds
from cpcompile.runtime.cache_buffers import cached_runs, require_cache, require_fit
from cpcompile.runtime.decoding import Step, decode
from cpcompile.runtime.openvino_session import load_session
from cpcompile.runtime.sampling import Sampling
from cpcompile.targets.requests import OPENVINO

PLUGINS: Mapping[str, str] = {"NvTensorRTRTXExecutionProvider": "onnxruntime_ep_nv_tensorrt_rtx"}
"""Execution providers that come in packages of their own, which the standard onnxruntime loads."""
TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
"""The types of arrays by their names in ONNX Runtime."""
Cache = Mapping[str, Array]
"""Keys and values of the tokens so far, by the names of the graph's inputs."""
DOCTOR = "`cpcompile doctor` says what this machine lacks"


@dataclass(frozen=True)
class Engine:
    """A loaded engine; `session` is an ordinary onnxruntime.InferenceSession, or an `OpenVinoSession`."""

    variant: Variant
    session: Any
    vocabulary: int | None = None
    """How many tokens a language model knows; None for other models."""

    def run(self, input_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Logits (batch, sequence, vocabulary) of input_ids (batch, sequence), an array or lists of token ids.

        UsageError: other shapes, no tokens, or ids that the vocabulary of this context does not have.
        """
        (logits,) = self._run([OUTPUT], {INPUT: self._tokens(input_ids)})
        result: npt.NDArray[np.float32] = logits
        return result

    def outputs(self, feeds: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        """The outputs of the graph by name, for `feeds`: the inputs by name, without the context.

        What belongs to the cache of a language model may be left out: the tokens then follow no others. Its keys and
        values are not among the outputs: see `step`.
        UsageError: inputs that are missing, unknown, or of another type or shape.
        """
        needed_names = {name for name in self._inputs if not is_optional(name)}
        if not isinstance(feeds, Mapping) or not needed_names <= feeds.keys() <= self._inputs.keys():
            given = ", ".join(map(str, feeds)) if isinstance(feeds, Mapping) else type(feeds).__name__
            needed = ", ".join(name for name in self._inputs if name in needed_names)
            raise UsageError(f"{self.variant.model}: needs its inputs by name, {needed}; given: {given or 'nothing'}")
        arrays = {name: self._array(name, value) for name, value in feeds.items()}
        require_fit(self.variant.model, arrays, self._presents)
        self._require_known(arrays.get(INPUT))
        return dict(zip(self._names, self._run(self._names, arrays), strict=True))

    def step(
        self, input_ids: npt.ArrayLike, cache: Cache | None = None, *, logits_to_keep: int = 0
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        """Logits (batch, kept, vocabulary) of tokens that follow those in `cache`, and the cache with both.

        logits_to_keep: how many of the last tokens' logits are computed; 0 for all.
        """
        keep = coerce(logits_to_keep, int, "logits_to_keep")
        require(keep >= 0, f"logits_to_keep is {logits_to_keep}: it cannot be negative; 0 keeps all")
        tokens, names = self._tokens(input_ids), [OUTPUT, *self._presents.values()]
        require(self.has_cache, f"{self.variant.model}: has no cache; use `run`, or build the bundle again")
        require_cache(self.variant.model, cache, self._presents, len(tokens))
        arrays = {name: self._array(name, value) for name, value in (cache or {}).items()}
        if cache and self.writes_in_place and min(tokens.shape) > 1:
            return self._step_by_step(tokens, cache, keep)
        logits, *present = self._run(names, {INPUT: tokens, **arrays, KEEP: np.asarray(keep)})
        return logits, dict(zip(self._presents, present, strict=True))

    def _step_by_step(self, tokens: Array, cache: Cache, keep: int) -> tuple[npt.NDArray[np.float32], Cache]:
        """The same, token by token: GroupQueryAttention takes several after a cache from one text alone."""
        logits = []
        for column in range(tokens.shape[1]):
            one, cache = self.step(tokens[:, column : column + 1], cache)
            logits.append(one)
        return np.concatenate(logits[-keep:], axis=1), cache

    @cached_property
    def has_cache(self) -> bool:
        """Whether it goes on where it was, instead of reading the whole text again."""
        return KEEP in self._inputs

    @cached_property
    def writes_in_place(self) -> bool:
        """Whether the cache may be one buffer with room for more tokens, instead of being joined anew at every step."""
        return IN_PLACE in self.session.get_modelmeta().custom_metadata_map

    @cached_property
    def _names(self) -> list[str]:
        return [each.name for each in self.session.get_outputs() if not PRESENT.fullmatch(each.name)]

    @cached_property
    def _presents(self) -> dict[str, str]:
        """Input of the past -> output of the present."""
        return {name: present for name in self._inputs if (present := present_of(name)) is not None}

    @cached_property
    def _shapes(self) -> dict[str, Sequence[int | str | None]]:
        return {name: each.shape for name, each in self._inputs.items()}

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        """The inputs by name, without those that select the context."""
        return {each.name: each for each in self.session.get_inputs() if each.name not in self.variant.feeds}

    def _tokens(self, ids: npt.ArrayLike) -> Array:
        """`ids` (batch, sequence) as the engine reads them."""
        if INPUT not in self._inputs or OUTPUT not in self._names:
            raise UsageError(
                f"{self.variant.model}: is no language model, its inputs are {', '.join(self._inputs)}: use `outputs`"
            )
        tokens = self._array(INPUT, ids)
        self._require_known(tokens)
        return tokens

    def _require_known(self, tokens: Array | None) -> None:
        """UsageError unless `tokens` are in the vocabulary; ONNX would count negative ones from the end of a table."""
        if self.vocabulary is None or tokens is None:
            return
        if not tokens.size:  # ONNX Runtime would divide by their number
            raise UsageError(f"{INPUT} has the shape {tokens.shape} and holds no token; give at least one")
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= self.vocabulary:
            raise UsageError(
                f"{INPUT} has the token {low if low < 0 else high}; those of {self.variant.context} are 0 to "
                f"{self.vocabulary - 1}"
            )

    def _array(self, name: str, value: npt.ArrayLike) -> Array:
        """`value` in the type of the input `name`, whose shape it has to fit; integers have to stay what they are."""
        declared = self._inputs[name]
        if (kind := TYPES.get(declared.type)) is None:
            return np.asarray(value)
        try:
            array = np.asarray(value)
        except ValueError as error:  # lists of different lengths
            raise UsageError(f"{name}: cannot be made an array of {kind.__name__} ({error})") from error
        if array.dtype != kind:
            array = _convert(name, array, kind)
        shape = declared.shape
        fits = len(shape) == array.ndim and all(
            not isinstance(size, int) or size == length for size, length in zip(shape, array.shape, strict=True)
        )
        if not fits:
            needed = ", ".join(str(size) for size in shape)
            raise UsageError(f"{name} has the shape {array.shape}; ({needed}) is needed")
        return array

    def _run(self, names: list[str], feeds: Feeds) -> list[Array]:
        """Run the session with the input that selects the context, where the engine serves several."""
        with self._running():
            outputs: list[Array] = self.session.run(names, complete(feeds, self._shapes) | self._chosen)
        return outputs

    @cached_property
    def _chosen(self) -> dict[str, Array]:
        """The inputs that select the context, where the engine serves several."""
        return {name: np.asarray(number) for name, number in self.variant.feeds.items()}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Turn an error of ONNX Runtime into one that names the engine."""
        try:
            yield
        except CpcompileError:
            raise  # of an `OpenVinoSession`
        except Exception as error:  # as in `create_session`
            raise CpcompileError(
                f"{self.variant.model}: ONNX Runtime {ort.__version__} cannot run it on these inputs: {error}"
            ) from error

    def cached_steps(self, batch: int, tokens: int) -> Step:
        """A function that reads `batch` texts step by step, and keeps the cache.

        It takes input_ids (batch, new), attention_mask (batch, past + new) and position_ids (batch, new), and gives the
        logits (batch, vocabulary) of the last token. tokens: how many each text has in the end, if it is not more.
        """
        constants = {KEEP: np.asarray(1)} | self._chosen
        empty = complete({INPUT: np.zeros((batch, 1), dtype=np.int64)}, self._shapes)
        run = cached_runs(self.session, self._presents, empty, constants, tokens if self.writes_in_place else None)

        def step(input_ids: Array, attention_mask: Array, position_ids: Array) -> npt.NDArray[np.float32]:
            given = {INPUT: input_ids, MASK: attention_mask, POSITIONS: position_ids}
            feeds = {name: value for name, value in given.items() if name in self._inputs}
            with self._running():
                logits = run(feeds, attention_mask.shape[1])
            last: npt.NDArray[np.float32] = logits[:, -1]
            return last

        return step

    def generate(
        self, prompt: Sequence[int] | Array, *, tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[int]:
        """Continue `prompt` by `tokens` ids: the most likely ones, or samples if `temperature` > 0.

        Samples differ from call to call unless a `seed` is given. UsageError: a prompt without tokens, or with others
        than those of the vocabulary; a negative number of tokens or temperature.
        """
        ids = self.require_prompt(prompt)
        steps = decode(self, [ids], tokens=tokens, sampling=Sampling(temperature=temperature), seed=seed)
        return (token for (token,) in steps if token is not None)

    def require_prompt(self, prompt: Sequence[int] | Array) -> list[int]:
        """`prompt` as a list of ids; UsageError unless it has at least one, and only those of the vocabulary."""
        try:
            if isinstance(prompt, str | bytes | Mapping):
                raise TypeError("it holds no ids")
            ids = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UsageError(
                f"the prompt is {prompt!r:.80}; token ids are needed, as the tokenizer of the context makes of text"
            ) from error
        if not ids:
            raise UsageError("the prompt is empty; give at least one token, such as the one that texts begin with")
        self._tokens([ids])
        return ids


def _convert(name: str, array: Array, kind: type[np.generic]) -> Array:
    """`array` as a `kind`: real numbers rounded, whole ones exactly."""
    real = np.issubdtype(kind, np.floating)
    if array.dtype.kind in ("iuf" if real else "biu"):
        converted = array.astype(kind)
        if real or np.array_equal(array, converted):
            return converted
    elif not array.size:  # of empty lists numpy knows no type
        return np.zeros(array.shape, kind)
    raise UsageError(f"{name} is {array.dtype}; {kind.__name__} is needed")


def load_engine(
    bundle: Bundle | str | PathLike[str], context: str, variant: str = "cpu-fp32", *, threads: int = 0
) -> Engine:
    """Verify and load one engine of a bundle or of its path; `threads` 0 leaves the number to ONNX Runtime.

    UsageError: no such context or variant, a damaged or missing file, a reference to a file that is not its own.
    CpcompileError: ONNX Runtime refuses the model, or falls back to another provider.

    ONNX Runtime parses the graph in this process. A graph from a stranger can take any amount of time and memory, so
    load it where that does no harm.
    """
    threads = require_threads(threads)
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return load_variant(bundle, bundle.variant(context, variant), threads=threads)


def require_threads(threads: int) -> int:
    """`threads`; UsageError unless it is 0 or more."""
    threads = coerce(threads, int, "threads")
    require(threads >= 0, f"threads is {threads}: it cannot be negative; 0 leaves the number to ONNX Runtime")
    return threads


def load_variant(
    bundle: Bundle, variant: Variant, *, threads: int, configure: Callable[[Any], None] = lambda options: None
) -> Engine:
    """Verify and load `variant` of `bundle`; `configure` edits options of ONNX Runtime once its files are verified."""
    if variant.plan:
        raise UsageError(f"{variant.model}: is a plan of {variant.runtime}, which ONNX Runtime does not run")
    bundle.verify_engine(variant)
    if variant.runtime == OPENVINO:
        session: Any = load_session(variant, threads=threads)
    else:
        options = session_options(variant, threads=threads)
        configure(options)
        session = create_session(variant, options)
    return Engine(variant, session, _classes(session) if variant.context in bundle.metadata["tokenizers"] else None)


def _classes(session: Any) -> int | None:
    """The last dimension of the logits; None where the graph does not fix it."""
    shape = next((output.shape for output in session.get_outputs() if output.name == OUTPUT), None)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def session_options(variant: Variant, *, threads: int = 0) -> Any:
    """onnxruntime.SessionOptions with what the bundle records for `variant`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in variant.session_options.items():
        options.add_session_config_entry(key, value)
    if variant.weights is not None:
        options.add_session_config_entry(WEIGHTS_OPTION, str(variant.weights.resolve()))
    return options


def create_session(variant: Variant, options: Any) -> Any:
    """An InferenceSession on the provider of `variant` alone; by itself ONNX Runtime would fall back to another."""
    chosen = _choose_provider(variant, options)
    try:
        session = ort.InferenceSession(variant.model, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime has one class per status code, without a common base
        reason = f"{str(error).strip()}{_hint(variant)}"
        raise CpcompileError(f"{variant.model}: ONNX Runtime {ort.__version__} cannot load it: {reason}") from error
    if session.get_providers()[0] != variant.provider:
        raise CpcompileError(
            f"{variant.model}: needs {variant.provider}, ONNX Runtime fell back to {session.get_providers()[0]}"
            f"{_hint(variant)}"
        )
    return session


def missing_provider(variant: Variant) -> str | None:
    """The reason why the execution provider of `variant` is not available; None if it is."""
    if variant.provider in ort.get_available_providers():
        return None
    devices = plugin_devices(variant.provider)
    return f"needs {variant.provider}; {devices}" if isinstance(devices, NotMeasured) else None


def _hint(variant: Variant) -> str:
    """A hint at the doctor; on the CPU provider the model itself is at fault."""
    return "" if variant.provider == CPU_PROVIDER else f"; {DOCTOR}"


def _choose_provider(variant: Variant, options: Any) -> list[tuple[str, dict[str, str]]] | None:
    """The `providers` of the InferenceSession; None where `options` get the devices of a packaged provider instead.

    Source: ONNX Runtime, docs/execution-providers/plugin-ep-libraries.
    """
    name, settings = variant.provider, dict(variant.provider_options)
    if name in ort.get_available_providers():
        if name != CPU_PROVIDER:
            with redirect_stdout(io.StringIO()):  # it prints what is missing, which the session reports anyway
                ort.preload_dlls()  # CUDA from NVIDIA's packages, which are not on the library path
        return [(name, settings)]
    devices = plugin_devices(name)
    if isinstance(devices, NotMeasured):
        raise CpcompileError(f"{variant.model}: needs {name}; {devices}. {DOCTOR}")
    options.add_provider_for_devices(devices, settings)
    return None


def plugin_devices(provider: str) -> list[Any] | NotMeasured:
    """The devices that a packaged provider finds, or the reason why there are none."""
    if provider not in PLUGINS:
        return NotMeasured(f"this ONNX Runtime {ort.__version__} has {', '.join(ort.get_available_providers())}")
    try:
        plugin: ModuleType = importlib.import_module(PLUGINS[provider])
        if provider not in {device.ep_name for device in ort.get_ep_devices()}:
            ort.register_execution_provider_library(provider, plugin.get_library_path())
    except Exception as error:  # its libraries may be missing or not match this ONNX Runtime
        return NotMeasured(f"its package {PLUGINS[provider]} cannot be loaded ({first_line(error)})")
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    return devices or NotMeasured("it finds no GPU that it supports")
