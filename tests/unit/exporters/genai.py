"""Run exported folders in ONNX Runtime GenAI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og

from cpcompile.core.generation import GenerationSettings
from cpcompile.core.types import Array
from cpcompile.exporters.genai_exporter import export_genai
from cpcompile.passes.keep_last_logits import KeepLastLogits

Logits = Callable[[list[int]], Array]
"""Ids of a text -> the logits of the token after it."""


def exported(models: Mapping[str, ir.Model], folder: Path, settings: GenerationSettings) -> dict[str, Path]:
    """The folders of frozen graphs, which are changed."""
    for model in models.values():
        KeepLastLogits()(model)
    folder.mkdir()
    options: dict[str, Any] = {"intra_op_num_threads": 1}
    return export_genai(
        models, folder, settings=dict.fromkeys(models, settings), session_options=dict.fromkeys(models, options)
    )


def generate(model: og.Model, prompts: Sequence[Sequence[int]], tokens: int, *, pad: int = 2) -> list[list[int]]:
    """The likeliest tokens after each prompt, in one batch; without the one that ends a text."""
    length = max(map(len, prompts))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length + tokens, batch_size=len(prompts))
    generator = og.Generator(model, params)
    filled = [[*prompt, *[pad] * (length - len(prompt))] for prompt in prompts]
    generator.append_tokens(np.array(filled, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[length:]] for row in range(len(prompts))]


def assert_likeliest(prompt: Sequence[int], got: Sequence[int], logits_of: Logits) -> None:
    """Every token of `got` is the likeliest after those before it, or as likely within the tolerance of parity."""
    text = list(prompt)
    for token in got:
        logits = logits_of(text)
        best = float(logits.max())
        assert best - logits[token] <= 1e-4 * np.abs(logits).max(), (len(text) - len(prompt), token, logits.argmax())
        text.append(token)
