"""Parameters of all contexts -> one file of weights that their engines share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.rounding import UNCALIBRATED, Calibration
from cpcompile.exporters.weights_file import Location, write_weights
from cpcompile.passes.derived_parameters import Derivation
from cpcompile.passes.freeze import Frozen
from cpcompile.passes.share_weights import KeptChannels, Run, ShareWeights, Whole, plan_runs
from cpcompile.pipeline.accounting import Accounting

WEIGHTS_FILE = "weights.bin"


@dataclass(frozen=True)
class Stored:
    """A file of weights that engines share: the asset, the file in it, and where the tensors lie."""

    uri: str | None
    file: Path | None
    locations: Mapping[str, Location]


NOT_STORED = Stored(None, None, {})
"""Every engine has its own weights inside."""


def store(
    writer: BundleWriter,
    models: Mapping[str, ir.Model],
    kept: Mapping[str, KeptChannels],
    whole: Mapping[str, Whole],
) -> Stored:
    """Write what the contexts have `kept` of the `whole` parameters once, and let the graphs `models` read that."""
    plan = plan_runs(kept, {name: whole[name].shape for channels in kept.values() for name in channels})
    runs = [run for runs in plan.values() for run in runs]
    staging = writer.stage("weights")
    pieces = ((run.stored_name, partial(_piece, whole[run.name], run)) for run in runs)
    locations = write_weights(staging / WEIGHTS_FILE, pieces)
    uri = writer.add_asset(staging)
    for context, model in models.items():
        ShareWeights(context, plan)(model)
    return Stored(uri, writer.asset(uri) / WEIGHTS_FILE, locations)


def wholes(
    dynamic: ir.Model,
    frozen: Mapping[str, Frozen],
    accounts: Mapping[str, Accounting],
    calibration: Calibration = UNCALIBRATED,
) -> dict[str, Whole]:
    """The parameters of all contexts by name, with their axes in the order of the engines."""
    permutations = {name: order for each in frozen.values() for name, order in each.permutations.items()}
    names = next(iter(accounts.values())).total_by_name
    return {
        name: Whole(
            _whole(dynamic, permutations, name).shape,
            partial(_whole, dynamic, permutations, name),
            calibration.get(name, UNCALIBRATED),
        )
        for name in names
        if name in dynamic.graph.initializers
    }


def kept_of(frozen: Frozen, whole: Mapping[str, Whole]) -> KeptChannels:
    """What a context keeps of the parameters in `whole`."""
    return {name: axes for name, axes in frozen.kept.items() if name in whole}


def derive(change: ir.passes.InPlacePass, model: ir.Model, kept: KeptChannels, whole: dict[str, Whole]) -> KeptChannels:
    """What `model` has of every parameter after the pass `change`; those that it makes are added to `whole`."""
    result = change(model)
    assert isinstance(result, Derivation)
    left = {name: axes for name, axes in kept.items() if name in model.graph.initializers}
    whole |= {name: each.whole for name, each in result.parameters.items()}
    return left | {name: each.kept for name, each in result.parameters.items()}


def _piece(whole: Whole, run: Run) -> npt.NDArray[np.generic]:
    """The elements of `run` as the engines read them."""
    return run.cut(whole.read())


def _whole(dynamic: ir.Model, permutations: Mapping[str, tuple[int, ...]], name: str) -> npt.NDArray[np.generic]:
    """The parameter `name` of all contexts, a view with its axes in the order of the engines."""
    tensor = dynamic.graph.initializers[name].const_value
    assert tensor is not None
    array = tensor.numpy()
    return array.transpose(permutations[name]) if name in permutations else array
