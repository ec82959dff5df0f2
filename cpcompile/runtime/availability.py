"""Whether this machine can run an engine, found out without loading it."""

from __future__ import annotations

from cpcompile.bundle.reader import Variant
from cpcompile.core.extras import missing_extra
from cpcompile.machine.gpu import NO_GPU, gpu_model
from cpcompile.runtime import openvino_session
from cpcompile.targets.requests import OPENVINO


def why_not_here(variant: Variant) -> str | None:
    """The reason why `variant` cannot run on this machine; None if no obstacle is known."""
    try:
        if variant.plan:
            from cpcompile.runtime import plan

            return plan.why_not_here(variant)
        if variant.runtime == OPENVINO:
            return openvino_session.why_not_here(variant)
        from cpcompile.runtime.engine import missing_provider

        if variant.on_cpu:
            return None
        return NO_GPU if gpu_model() is None else missing_provider(variant)
    except ModuleNotFoundError as error:
        if (reason := missing_extra(error, "it")) is None:
            raise
        return reason
