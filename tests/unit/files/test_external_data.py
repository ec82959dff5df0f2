"""Models whose data is in other files get it inside, as onnx itself would put it there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_tensor

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files import external_data
from cpcompile.files.external_data import detach_data, embed_data, references_of

DATA = np.arange(300, dtype=np.float32)


def tensor(name: str, count: int, **external: str) -> onnx.TensorProto:
    outside = onnx.TensorProto(name=name, dims=[count], data_type=onnx.TensorProto.FLOAT, data_location=1)
    for key, value in ({"location": "w.bin"} | external).items():
        outside.external_data.add(key=key, value=value)
    return outside


def model_of(*initializers: onnx.TensorProto, nodes: tuple[onnx.NodeProto, ...] = ()) -> onnx.ModelProto:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    graph = onnx.helper.make_graph([*nodes, onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y], initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def node(op: str, **attributes: object) -> onnx.NodeProto:
    return onnx.helper.make_node(op, [], ["v"], **attributes)


def branch(*initializers: onnx.TensorProto) -> onnx.GraphProto:
    return model_of(*initializers).graph


def sparse() -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor("v", 2, offset="0", length="8"), dims=[4])


MODELS = {
    "initializer": model_of(tensor("w", 4, offset="16", length="16")),
    "without offset": model_of(tensor("w", 4, length="16")),
    "to the end": model_of(tensor("w", 299, offset="4")),
    "whole": model_of(tensor("w", 300)),
    "empty": model_of(tensor("w", 0, offset="16", length="0")),
    "checksum": model_of(tensor("w", 4, length="16", checksum="0")),
    "several": model_of(
        tensor("a", 300, offset="0", length="1200"),
        onnx.numpy_helper.from_array(DATA, "b"),
        tensor("c", 1, offset="1196", length="4"),
    ),
    "constant": model_of(nodes=(node("Constant", value=tensor("w", 200, length="800")),)),
    "numbers": model_of(nodes=(node("Own", a=0.5, b=[1.5, 2.5], c=-1, d=[2, 3], value=tensor("w", 4, length="16")),)),
    "tensors": model_of(nodes=(node("Own", values=[tensor("a", 1, length="4"), tensor("b", 2, length="8")]),)),
    "branch": model_of(nodes=(node("If", then_branch=branch(tensor("w", 4, length="16")), else_branch=branch()),)),
    "sparse": model_of(nodes=(node("Constant", sparse_value=sparse()),)),
    "nothing": model_of(onnx.numpy_helper.from_array(DATA, "b")),
}


def tensors_in(message: object) -> list[onnx.TensorProto]:
    """All of them, by protobuf's reflection."""
    if isinstance(message, onnx.TensorProto):
        return [message]
    inner = [value for field, value in message.ListFields() if field.message_type is not None]  # type: ignore[attr-defined]
    return [
        found
        for each in inner
        for one in (each if not hasattr(each, "ListFields") else [each])
        for found in tensors_in(one)
    ]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_data_is_where_onnx_would_put_it(model: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(DATA.tobytes())
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    embed_data(tmp_path / "in.onnx", tmp_path, tmp_path / "out.onnx")
    assert not references_of(tmp_path / "out.onnx")
    found, expected = onnx.load(tmp_path / "out.onnx"), onnx.ModelProto.FromString(model.SerializeToString())
    for each in tensors_in(expected):
        if each.data_location == onnx.TensorProto.EXTERNAL:
            load_external_data_for_tensor(each, str(tmp_path))
            del each.external_data[:]
    for each in (*tensors_in(found), *tensors_in(expected)):
        assert each.data_location == onnx.TensorProto.DEFAULT
        each.ClearField("data_location")
    assert found == expected


@pytest.mark.parametrize(
    ("external", "says"),
    [
        ({"offset": "1196", "length": "16"}, "needs the bytes up to 1,212 of .*w.bin, which has 1,200"),
        ({"offset": "1204"}, "needs the bytes up to 1,200"),
        ({"location": "other.bin"}, "other.bin: cannot be read"),
        ({"location": ""}, "not named"),
        ({"offset": "-1"}, "the offset of a tensor"),
    ],
)
def test_data_that_is_not_there_is_a_sentence(external: dict[str, str], says: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(DATA.tobytes())
    (tmp_path / "in.onnx").write_bytes(model_of(tensor("w", 4, **external)).SerializeToString())
    with pytest.raises(UsageError, match=says):
        embed_data(tmp_path / "in.onnx", tmp_path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_what_is_no_model_is_a_sentence(tmp_path: Path) -> None:
    whole = MODELS["several"].SerializeToString()
    (tmp_path / "w.bin").write_bytes(DATA.tobytes())
    for end in (0, 1, 30, len(whole) - 1):
        (tmp_path / "in.onnx").write_bytes(whole[:end])
        with pytest.raises(UsageError, match="in.onnx: is not a valid ONNX model"):
            embed_data(tmp_path / "in.onnx", tmp_path, tmp_path / "out.onnx")


def test_one_file_holds_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 1000)
    (tmp_path / "w.bin").write_bytes(DATA.tobytes())
    (tmp_path / "in.onnx").write_bytes(MODELS["whole"].SerializeToString())
    with pytest.raises(CpcompileError, match="one file holds 1,000 at most"):
        embed_data(tmp_path / "in.onnx", tmp_path, tmp_path / "out.onnx")


@pytest.mark.parametrize("name", ["initializer", "several", "whole", "empty", "nothing"])
def test_detached_tensors_are_inputs_in_their_place(name: str, tmp_path: Path) -> None:
    path, before = tmp_path / "model.onnx", MODELS[name]
    onnx.save(before, path)
    detached = detach_data(path)
    after = onnx.load_model_from_string(detached.model)
    outside = {each.name: each for each in before.graph.initializer if each.data_location == 1}
    assert (detached.inputs, detached.outputs, detached.references) == (("x",), ("y",), references_of(path))
    assert [each.name for each in detached.references] == list(outside)
    assert [each for each in before.graph.initializer if each.name not in outside] == list(after.graph.initializer)
    added = {each.name: each.type.tensor_type for each in after.graph.input if each.name != "x"}
    assert added.keys() == outside.keys()
    for each in outside.values():
        shape = [dimension.dim_value for dimension in added[each.name].shape.dim]
        assert (added[each.name].elem_type, shape) == (each.data_type, list(each.dims))
    assert without_values(after) == without_values(before)


def without_values(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.graph.initializer[:], copy.graph.input[:]
    return copy


@pytest.mark.parametrize("name", ["constant", "tensors", "branch", "sparse"])
def test_other_tensors_cannot_be_detached(name: str, tmp_path: Path) -> None:
    """A runtime would look for them in the working directory."""
    onnx.save(MODELS[name], tmp_path / "model.onnx")
    with pytest.raises(UsageError, match=r"model.onnx: a tensor that is no initializer lies in another file"):
        detach_data(tmp_path / "model.onnx")
