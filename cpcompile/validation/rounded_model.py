"""The eager model as a quantised engine has it: with the same rounded weights, and inputs rounded in the same way.

    with rounding:
        model(input_ids, context)

Parity of a quantised engine compares with this, so that it shows what the compiler did; what the precision costs is a
matter of quality. Parameters are rounded whole, as `cpcompile.core.rounding` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.rounding import QUANTIZED, SCHEMES, UNCALIBRATED, Calibrated, Calibration, Scheme, restored
from cpcompile.runtime.engine import Engine
from cpcompile.targets.plan_info import PlanInfo

LEVELS = 255
"""Of 8 bits without a sign, which DynamicQuantizeLinear makes."""
HALF = 127
"""The largest number of 8 bits with a sign, to which MatMulNBits rounds its inputs."""


def schemes_of(engine: Engine) -> dict[str, Scheme]:
    """The scheme of every parameter that `engine` has rounded; UsageError if its graph does not say it."""
    text = engine.session.get_modelmeta().custom_metadata_map.get(QUANTIZED, "{}")
    try:
        return {str(name): SCHEMES[scheme] for name, scheme in json.loads(text).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{engine.variant.model}: its graph does not say how its weights are rounded ({text!r:.80}); build it again"
        ) from error


def schemes_of_plan(plan: PlanInfo) -> dict[str, Scheme]:
    """The same of a TensorRT plan."""
    return {name: replace(SCHEMES[plan.precision], products_only=True) for name in plan.rounded}


class Rounding(TorchFunctionMode):
    """While it is active, products and embeddings read the rounded parameters of `model`.

    calibration: what parameters are rounded to. inputs: whether the other side of a product is rounded as well.
    CpcompileError: `schemes` names a parameter that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        schemes: Mapping[str, Scheme],
        calibration: Calibration = UNCALIBRATED,
        *,
        inputs: bool = True,
    ) -> None:
        super().__init__()
        self._calibration = calibration
        self._inputs = inputs
        own = dict(model.named_parameters(remove_duplicate=False))
        if foreign := sorted(schemes.keys() - own.keys()):
            raise CpcompileError(
                f"the engine has rounded {foreign[0]}, a parameter that the model does not have; build it again"
            )
        self._schemes: dict[Tensor, Scheme] = {own[name]: scheme for name, scheme in schemes.items()}
        self._names: dict[Tensor, str] = {own[name]: name for name in schemes}
        self._rounded: dict[tuple[Tensor, bool], Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.rounds(func, args):
            x, parameter, *rest = args
            looked_up = func is F.embedding
            weight = self._weight(parameter, outputs_first=func is not torch.matmul, looked_up=looked_up)
            args = (x if looked_up else self._input(x, parameter), weight, *rest)
        return func(*args, **dict(kwargs or {}))

    def rounds(self, func: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
        """The name of the parameter that a call reads rounded; None for every other call."""
        if func not in (F.linear, F.embedding, torch.matmul):  # the weights of GPT-2 lie as (inputs, outputs)
            return None
        scheme = self._schemes.get(args[1])
        if scheme is None or (func is F.embedding and scheme.products_only):
            return None
        return self._names[args[1]]

    def _input(self, x: Tensor, parameter: Tensor) -> Tensor:
        scheme = self._schemes[parameter]
        factors = scheme.factors(self._calibrated(parameter))
        x = x if factors is None else x * torch.from_numpy(factors)
        return _rounded_input(x, scheme) if self._inputs and not scheme.products_only else x

    def _calibrated(self, parameter: Tensor) -> Calibrated:
        return self._calibration.get(self._names[parameter], UNCALIBRATED)

    def _weight(self, parameter: Tensor, *, outputs_first: bool, looked_up: bool) -> Tensor:
        scheme, calibrated = self._schemes[parameter], self._calibrated(parameter)
        looked_up = looked_up and scheme.factors(calibrated) is not None  # else it is the same, and kept once
        if (parameter, looked_up) not in self._rounded:
            whole = parameter.detach().numpy()
            weight = whole.T if outputs_first else whole
            try:
                rounded = scheme.rounded(weight, calibrated, looked_up=looked_up)
            except ValueError as error:
                shape = tuple(whole.shape)
                raise CpcompileError(
                    f"a parameter of shape {shape} does not fall into the blocks that the engine names; build it again"
                ) from error
            value = restored(rounded, weight.dtype)
            self._rounded[parameter, looked_up] = torch.from_numpy(value.T if outputs_first else value)
        return self._rounded[parameter, looked_up]


def _rounded_input(x: Tensor, scheme: Scheme) -> Tensor:
    """`x` (…, channels) as products of `scheme` read it."""
    if scheme.block is None:
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = (high - low) / LEVELS
        if not scale:
            return x
        zero = torch.round(-low / scale).clamp(0, LEVELS)
        return (torch.clamp(torch.round(x / scale) + zero, 0, LEVELS) - zero) * scale
    blocks = x.reshape(*x.shape[:-1], -1, scheme.block)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / HALF
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (torch.round(blocks / scale) * scale).flatten(-2)
