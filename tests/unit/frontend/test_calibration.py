"""`model.calibration.pt`: what was saved comes back, and files that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpcompile.core.errors import UsageError
from cpcompile.core.paths import calibration_path
from cpcompile.core.rounding import SCHEMES, Rounded
from cpcompile.frontend.calibration import load_calibration, require_free, save_calibration
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.frontend.source import open_source

FEW, EIGHT = SCHEMES["int4-weights"], SCHEMES["int8"]
NAME = "layers.0.ffn.up.weight"


@pytest.fixture
def path(trained: Path, tmp_path: Path) -> Path:
    """Of a model beside it."""
    model = tmp_path / "model.pt"
    model.write_bytes(trained.read_bytes())
    save_calibration({NAME: expected(model)}, model, calibration_path(model))
    return calibration_path(model)


def expected(model: Path) -> dict[str, Rounded]:
    weight = load_checkpoint(model).state[NAME].numpy().T
    factors = np.linspace(0.5, 2, len(weight), dtype=np.float32)
    return {FEW.name: FEW.round(weight), EIGHT.name: EIGHT.round(weight / factors[:, None])._replace(factors=factors)}


def test_what_was_saved_comes_back(path: Path) -> None:
    source = open_source(path.with_name("model.pt"))
    ((name, rounded),) = source.calibration.items()
    assert name == NAME and rounded.keys() == {FEW.name, EIGHT.name}
    for scheme, each in expected(source.path).items():
        for found, saved in zip(rounded[scheme], each, strict=True):
            np.testing.assert_array_equal(found, saved)
            assert found is saved is None or (found is not None and found.dtype == saved.dtype)


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    plain = torch.load(path, weights_only=True)
    edit(plain)
    torch.save(plain, path)


def tensors(plain: dict[str, Any], scheme: str = FEW.name) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = plain["rounded"][scheme][NAME]
    return found


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda p: p.pop("format"), "is no calibration"),
        (lambda p: p.update(version=1), "version 1, this cpcompile reads 2"),
        (lambda p: p.update(model="0" * 64), "was made for another model"),
        (lambda p: p.pop("rounded"), "incomplete or inconsistent"),
        (lambda p: p["rounded"].update(int3=p["rounded"][FEW.name]), "incomplete or inconsistent"),
        (lambda p: p["rounded"][FEW.name].update(foreign=tensors(p)), "incomplete or inconsistent"),
        (lambda p: tensors(p).pop("scales"), "incomplete or inconsistent"),
        (lambda p: tensors(p).update(numbers=tensors(p)["numbers"].float()), "does not make float32"),
        (lambda p: tensors(p).update(numbers=tensors(p)["numbers"][1:]), "does not make"),
        (lambda p: tensors(p).update(numbers=tensors(p)["numbers"][0]), "not enough values"),
        (lambda p: tensors(p).update(scales=tensors(p)["scales"][:, :, 1:]), "does not make"),
        (lambda p: tensors(p)["numbers"].fill_(8), "out of the range"),
        (lambda p: tensors(p)["scales"].fill_(float("nan")), "out of the range"),
        (lambda p: tensors(p).update(numbers=[1]), "incomplete or inconsistent"),
        (lambda p: tensors(p).update(more=tensors(p)["scales"]), "incomplete or inconsistent"),
        (lambda p: tensors(p).update(tensors(p, "int8")), "int4-weights does not"),
        (lambda p: tensors(p).update(factors=tensors(p, "int8")["factors"]), "int4-weights does not take factors"),
        (lambda p: tensors(p, "int8")["factors"].neg_(), "not all positive"),
        (lambda p: tensors(p, "int8")["factors"].fill_(float("inf")), "not all positive"),
        (lambda p: tensors(p, "int8").update(factors=tensors(p, "int8")["factors"][1:]), "does not take factors"),
        (lambda p: tensors(p, "int8").pop("factors"), "is damaged"),
        (lambda p: tensors(p)["numbers"][0, 0, :1].add_(1).clamp_(max=7), "is damaged"),
        (lambda p: tensors(p)["scales"].zero_(), "is damaged"),
        (lambda p: p["rounded"][FEW.name].clear(), "is damaged"),
    ],
)
def test_what_does_not_fit_is_refused(path: Path, edit: Callable[[dict[str, Any]], object], says: str) -> None:
    edited(path, edit)
    with pytest.raises(UsageError, match=says) as caught:
        _ = open_source(path.with_name("model.pt")).calibration
    assert "calibrate again, or take it away" in str(caught.value)


def test_other_files_are_refused(path: Path) -> None:
    model, dense = path.with_name("model.pt"), load_checkpoint(path.with_name("model.pt"))
    for content in (b"", path.read_bytes()[:-100], b"PK\x03\x04", model.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="calibrate again, or take it away"):
            load_calibration(path, model, dense.model)
    path.unlink()
    path.symlink_to("nowhere.pt")
    with pytest.raises(UsageError, match="calibrate again, or take it away"):
        _ = open_source(model).calibration


def test_only_a_calibration_is_replaced(path: Path) -> None:
    assert require_free(path) == path
    path.write_bytes(path.with_name("model.pt").read_bytes())
    with pytest.raises(UsageError, match="is no calibration, and stays as it is"):
        require_free(path)
    path.unlink()
    assert require_free(path) == path
    path.mkdir()
    with pytest.raises(UsageError, match=path.name):
        require_free(path)
