"""An engine that reads and writes text.

engine = load("model.cpc", context="english")
engine.generate("Return the ", max_new_tokens=40)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cpcompile.bundle.reader import BEST, Bundle, Variant, open_bundle
from cpcompile.core.coercion import coerce, require
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.generation import GenerationSettings
from cpcompile.core.probabilities import log_softmax, require_numbers
from cpcompile.runtime.availability import why_not_here
from cpcompile.runtime.decoding import decode
from cpcompile.runtime.engine import DOCTOR, Engine, load_engine
from cpcompile.runtime.sampling import Sampling
from cpcompile.runtime.text_stream import TextStream
from cpcompile.text.tokenization import leading_tokens, parse_tokenizer
from cpcompile.text.vocabulary import end_of

"""The variant that is expected to be the fastest of those that run here."""
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Score:
    """How likely a text is. Its first token is not predicted, unless there are leading ones in front of it."""

    log_likelihood: float
    """The sum over the predicted tokens, natural logarithm."""
    tokens: int
    """How many were predicted."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return float(np.exp(-self.log_likelihood / self.tokens))


@dataclass(frozen=True)
class TextEngine:
    """The engine of one context, its tokenizer, and what generates text with it. It may be used by many threads."""

    engine: Engine
    tokenizer: Tokenizer
    generation: GenerationSettings

    @property
    def context(self) -> str:
        """The name of the context."""
        return self.engine.variant.context

    def __call__(self, input_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Logits (batch, sequence, vocabulary) of input_ids (batch, sequence)."""
        return self.engine.run(input_ids)

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """The ids of `text`, after those that stand in front of every text.

        special_tokens: the text spells out special tokens, those in front too, as a chat template does; else they are
        ordinary text, so that nobody can end a text from within.
        """
        tokenizer = self._with_special_tokens if special_tokens else self.tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids if special_tokens else [*self.generation.leading, *ids]

    @cached_property
    def _with_special_tokens(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer.to_str())

    def decode(self, ids: Ids) -> str:
        """The text of `ids`, without special tokens."""
        text: str = self.tokenizer.decode([int(each) for each in ids])
        return text

    def score(self, text: str) -> Score:
        """How likely `text` is.

        UsageError: nothing of it is left to predict, or it is too long for the model. CpcompileError: logits that are
        not numbers.
        """
        ids = self._prompt(text)
        given = max(1, len(self.generation.leading))
        require(len(ids) > given, f"the text {text!r:.80} is too short to be scored: its first token is given")
        logits = self.engine.run([ids])[0, given - 1 : -1]
        require_numbers(logits)
        likelihoods = log_softmax(logits)
        return Score(float(likelihoods[np.arange(len(likelihoods)), ids[given:]].sum()), len(likelihoods))

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Any:
        """What follows `prompt`: text after text, ids after ids, a list after a list of either.

        It ends after max_new_tokens, where the model ends its text, where it has read as much as it can, and before one
        of the strings `stop`. stream: an iterator over pieces of text, or ids, as they come. temperature: 0 for the
        most likely tokens; see `Sampling` for it and for the others. Samples differ from call to call without a `seed`.
        UsageError: an empty prompt, one that is too long or has unknown ids, and options that are out of range.
        CpcompileError, when the token is due: logits that are not numbers.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        limit = coerce(max_new_tokens, int, "max_new_tokens")
        require(limit >= 0, f"max_new_tokens is {limit}: it cannot be negative")
        stops = coerce([stop] if isinstance(stop, str) else stop, tuple[str, ...], "stop")
        require(all(stops), "stop has an empty string, which is everywhere; leave it out")
        single = isinstance(prompt, str) or not _holds_prompts(prompt)
        prompts = [prompt] if single else list(prompt)
        if stream and not single:
            raise UsageError("stream is for one prompt; give the prompts one by one, or leave stream out")
        texts = [isinstance(each, str) for each in prompts]
        if stops and not all(texts):
            raise UsageError("stop strings are for text; prompts of ids end at the ids in generation.end")
        rows = [self._prompt(each) for each in prompts]
        if self.generation.context_length is not None:
            limit = min(limit, self.generation.context_length - max(map(len, rows)))
        steps = decode(self.engine, rows, tokens=limit, sampling=sampling, end=self.generation.end, seed=seed)
        if stream:
            ids = (token for (token,) in steps if token is not None)
            return self._pieces(rows[0], ids, stops) if texts[0] else ids
        whole = self._batch(rows, texts, steps, stops)
        return whole[0] if single else whole

    def _pieces(self, prompt: Sequence[int], ids: Iterator[int], stop: Sequence[str]) -> Iterator[str]:
        text = TextStream(self.tokenizer, prompt, stop)
        for token in ids:
            if piece := text.add(token):
                yield piece
            if text.stopped:
                return
        if piece := text.finish():
            yield piece

    def _batch(
        self,
        rows: Sequence[Sequence[int]],
        texts: Sequence[bool],
        steps: Iterator[list[int | None]],
        stop: Sequence[str],
    ) -> list[Any]:
        """The whole continuations of several prompts, which are computed together."""
        ids: list[list[int]] = [[] for _ in rows]
        streams = [TextStream(self.tokenizer, row, stop) for row in rows]
        written = ["" for _ in rows]
        for step in steps:
            for row, token in enumerate(step):
                if token is not None and not streams[row].stopped:
                    ids[row].append(token)
                    written[row] += streams[row].add(token) if texts[row] else ""
            if all(each.stopped for each in streams):
                break
        ended = [text + stream.finish() for text, stream in zip(written, streams, strict=True)]
        return [text if is_text else row for text, row, is_text in zip(ended, ids, texts, strict=True)]

    def _prompt(self, prompt: str | Ids) -> list[int]:
        """The ids of a prompt, which the model can read."""
        ids = self.engine.require_prompt(self.encode(prompt) if isinstance(prompt, str) else prompt)
        limit = self.generation.context_length
        if limit is not None and len(ids) > limit:
            raise UsageError(f"the prompt has {len(ids):,} tokens; {self.context} reads at most {limit:,}: shorten it")
        return ids


def _holds_prompts(prompt: Any) -> bool:
    """Whether `prompt` is a list of prompts, not of ids."""
    try:
        return any(isinstance(each, str) or hasattr(each, "__len__") for each in prompt)
    except TypeError:
        return False


def load(
    bundle: Bundle | str | PathLike[str], context: str | None = None, variant: str = BEST, *, threads: int = 0
) -> TextEngine:
    """Verify and load the engine of `context`; it may be left out where there is only one.

    variant: the name of an engine, or "best" for a GPU's if it runs here, else what a build with `--target best` chose,
    else the CPU's in float32: whether fewer bits do is for you to say. threads: 0 leaves the number to ONNX Runtime.
    UsageError and CpcompileError as `load_engine`; UsageError for a model that reads no text.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    chosen = choose_context(opened, context)
    return with_tokenizer(opened, load_engine(opened, chosen, choose_variant(opened, chosen, variant), threads=threads))


def choose_context(bundle: Bundle, context: str | None) -> str:
    """`context`, or the only one; UsageError lists what there is."""
    if context is None and len(bundle.contexts) > 1:
        raise UsageError(f"{bundle.root}: has several contexts, choose one of {', '.join(bundle.contexts)}")
    return bundle.contexts[0] if context is None else context


def choose_variant(bundle: Bundle, context: str, name: str) -> str:
    """`name`, or what "best" stands for."""
    if name != BEST:
        return name
    variants = [each for each in bundle.variants(context) if not each.plan and why_not_here(each) is None]
    if not variants:
        raise CpcompileError(f"{bundle.root}: no engine of {context} runs here; {DOCTOR}")
    return min(variants, key=partial(_rank, bundle.best)).name


def _rank(best: str, variant: Variant) -> tuple[bool, bool, bool, bool]:
    """Engines of one context first, then those of a GPU, then what the build chose, then unrounded weights."""
    return bool(variant.feeds), variant.on_cpu, variant.name != best, variant.precision != "fp32"


def with_tokenizer(bundle: Bundle, engine: Engine) -> TextEngine:
    """`engine`, with the tokenizer of its context; UsageError for a model that reads no text."""
    context = engine.variant.context
    text = bundle.tokenizer(context).read_text(encoding="utf-8")
    try:
        tokenizer = parse_tokenizer(text)
    except ValueError as error:
        raise UsageError(f"{bundle.tokenizer(context)}: is no tokenizer.json ({error}); build it again") from error
    settings = bundle.generation(context)
    if settings is None:  # a bundle from before they were recorded
        end = tokenizer.token_to_id(end_of(tokenizer))
        settings = GenerationSettings(end=() if end is None else (end,), leading=leading_tokens(text))
    return TextEngine(engine, tokenizer, settings)
