"""Models built around existing tensors, without weights of their own.

    with without_weights():
        model = make()                  parameters have only shape and type
    share_state(model, state)           parameters are the tensors of `state`

A checkpoint is then in memory only once, and no random values are drawn just to be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

DRAWING = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


@contextmanager
def without_weights() -> Iterator[None]:
    """Make parameters without memory (device "meta"); buffers are real, since they are computed and not loaded."""
    hook = register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]
    try:
        with _NothingDrawn():
            yield
    finally:
        hook.remove()


class _NothingDrawn(TorchFunctionMode):
    """Skips the random initialisation of tensors without memory.

    torch would trace the drawing, and import 70 MB of torch._dynamo and sympy for it, which would then count as memory
    of the eager model.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWING and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        return func(*args, **kwargs)


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:  # a parameter with two names is registered twice
        return parameter
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def share_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the tensors of `state` those of `model`: a change in place changes both.

    RuntimeError: names or shapes do not match. ValueError: a tensor is of another type, which a copy would convert.
    """
    for name, own in model.state_dict().items():
        if name in state and (state[name].dtype is not own.dtype or state[name].is_meta):
            raise ValueError(f"{name} is {state[name].dtype} on {state[name].device}, the model has {own.dtype}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # As parameters, so that one with two names stays one object.
    model.load_state_dict({n: nn.Parameter(t) if n in parameters else t for n, t in state.items()}, assign=True)
