"""Arrays that a user gives for the inputs of a model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.core.errors import UsageError
from cpcompile.files.arrays import load_inputs
from tests.unit.passes.graph_text import parse

TEXT = "(int64[N,4] ids, float[N,3] x, string[N] s) => (float[N,3] y) { y = Neg(x) }"
RIGHT = {"ids": np.zeros((2, 4), np.int64), "x": np.ones((5, 3), np.float32), "s": np.array(["a", "b"])}
TAKES = "ids int64[N,4], x float[N,3], s string[N]"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(ir.to_proto(parse(TEXT, {})), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_what_the_model_takes_is_given_as_it_is(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **RIGHT)  # type: ignore[arg-type]
    feeds = load_inputs(tmp_path / "in.npz", model)
    assert feeds.keys() == RIGHT.keys()
    assert all(np.array_equal(feeds[name], array) for name, array in RIGHT.items())
    np.savez(tmp_path / "less.npz", x=RIGHT["x"], s=RIGHT["s"])
    assert load_inputs(tmp_path / "less.npz", model, bound=["ids"]).keys() == {"x", "s"}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"mask": np.ones(2)}, f"'mask' is no input of MODEL, which takes {TAKES}"),
        ({"ids": None}, f"holds no 'ids'; MODEL takes {TAKES}"),
        ({"ids": np.zeros((2, 4), np.int32)}, "'ids' is int32[2,4]; MODEL takes ids int64[N,4]"),
        ({"ids": np.zeros((2, 5), np.int64)}, "'ids' is int64[2,5]; MODEL takes ids int64[N,4]"),
        ({"ids": np.zeros(4, np.int64)}, "'ids' is int64[4]; MODEL takes ids int64[N,4]"),
        ({"x": np.ones((5, 3))}, "'x' is float64[5,3]; MODEL takes x float[N,3]"),
        ({"s": np.ones(2, np.float32)}, "'s' is float32[2]; MODEL takes s string[N]"),
        ({"x": np.array([["a", "b", "c"]])}, "'x' is <U1[1,3]; MODEL takes x float[N,3]"),
    ],
)
def test_what_it_does_not_take_is_refused(
    model: Path, tmp_path: Path, other: dict[str, np.ndarray | None], says: str
) -> None:
    arrays = {name: array for name, array in ({**RIGHT, **other}).items() if array is not None}
    np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as raised:
        load_inputs(tmp_path / "in.npz", model)
    assert str(raised.value) == re.sub("MODEL", str(model), f"{tmp_path / 'in.npz'}: {says}")
