"""Capture: eager model -> one dynamic graph for all contexts.

The graph has the inputs `input_ids` (batch, sequence) and `context` (int64 scalar), the gates as
ordinary Gather and Mul, and keeps the names of the parameters: what is removed later is
accounted for by these names. The exporter's own optimiser is off because it renames and merges them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch

from cpcompile.core.errors import CpcompileError
from cpcompile.models.language_model import LanguageModel

OPSETS = (20, 23)
"""With opset 23 attention and RMSNorm are single operators; 20 spells them out."""


def capture(model: LanguageModel, *, opset: int = 23) -> ir.Model:
    """The dynamic graph of a gated model; any context, full cost."""
    return _export(model, {"context": torch.tensor(0)}, opset)


def capture_dense(model: LanguageModel, *, opset: int = 23) -> ir.Model:
    """The graph of an ungated model: what a plain export of the dense baseline gives."""
    return _export(model, {}, opset)


def _export(model: LanguageModel, context: dict[str, torch.Tensor], opset: int) -> ir.Model:
    ids = torch.zeros((2, 16), dtype=torch.int64)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with _quiet():
        program = torch.onnx.export(
            model.eval(),
            (ids, *context.values()),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=["input_ids", *context],
            output_names=["logits"],
            dynamic_shapes=(dynamic, *(None for _ in context)),
        )
    if program is None:
        raise CpcompileError("torch.onnx.export gave no program; this torch is not supported")
    captured: ir.Model = program.model
    own_names = {id(tensor): name for name, tensor in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name, value in list(captured.graph.initializers.items()):
        if name in every:  # a parameter under two names goes by the first
            value.name = own_names[id(every[name])]
    parameters = set(own_names.values())
    missing = parameters - set(captured.graph.initializers)
    if missing:
        raise CpcompileError(f"capture lost the parameters {', '.join(sorted(missing))}; this is a defect of cpcompile")
    return captured


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns about packages that nobody asked for (torchvision)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
