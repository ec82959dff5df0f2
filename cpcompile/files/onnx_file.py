"""ONNX files: a given file is validated when it is read, and a new file appears whole or not at all.

Weights stay where they are: external tensors are mapped, and read when they are used. Source: ONNX,
docs/ExternalData.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from cpcompile.core.errors import CpcompileError, UsageError, first_line
from cpcompile.files.external_data import PROTOBUF_LIMIT
from cpcompile.files.pointers import require_fetched
from cpcompile.files.weights import parameters_in
from cpcompile.files.whole_files import unfinished

ROOM_FOR_THE_GRAPH = 1 << 27
"""Bytes below PROTOBUF_LIMIT; the weights of larger models are in a file beside the graph."""
MODULE = "namespace"
"""The node property in which torch records the module path: `: Decoder/layers.0: Layer/…`."""
NO_MODULE = "_empty_nn_module_stack"
"""The prefix of the name that torch writes where there is no module."""


@dataclass(frozen=True)
class Size:
    """The size of a model."""

    nodes: int
    parameters: int
    """Elements of the tensors that weights stand for, in whatever form they are stored (see `weights`)."""
    bytes: int
    """Bytes of all tensors."""


def load_onnx(path: Path, *, data: Path | None = None) -> ir.Model:
    """The model in `path`; UsageError if it is not a model, or its external data is missing, too short or elsewhere.

    The file and its data may be links, as in the cache of the Hugging Face hub. data: the folder of the external data,
    if it is not that of the model; links that leave it are refused.
    """
    require_fetched(path)
    try:
        model = ir.load(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of an .onnx file") from error
    except Exception as error:  # the parser may raise anything on arbitrary bytes
        cause: BaseException = error
        while (before := cause.__cause__ or (cause.__context__ if isinstance(cause, TypeError) else None)) is not None:
            cause = before  # onnx_ir raises TypeErrors where it describes errors
        if isinstance(cause, NotImplementedError):
            raise UsageError(
                f"{path}: contains something that cannot be read ({first_line(cause)}); export the model without it"
            ) from error
        raise UsageError(f"{path}: is not a valid ONNX model ({first_line(cause)}); export it again") from error
    if not model.ir_version or not (len(model.graph) or model.graph.outputs):
        raise UsageError(f"{path}: holds no graph; give an .onnx file")
    for value in (value for node in model.graph.all_nodes() for value in node.inputs):
        if value is not None and value.producer() is None and not (value.is_graph_input() or value.is_initializer()):
            raise UsageError(
                f"{path}: nothing produces {value.name!r}, which a node reads; store sparse initializers as dense ones"
            )
    for graph in model.graphs():
        for value in graph.outputs:
            if value.producer() is None and not (value.is_graph_input() or value.is_initializer()):
                raise UsageError(
                    f"{path}: nothing in the graph {graph.name!r} produces its output {value.name!r}; export it again, "
                    "with an Identity if the value is of the graph around it"
                )
    try:
        for body in (model.graph, *(function.graph for function in model.functions.values())):
            body.sort()  # runtimes accept nodes in any order
    except ValueError as error:
        raise UsageError(f"{path}: some of its nodes read each other's results in a circle; export it again") from error
    for tensor in external_tensors(model):
        tensor.base_dir = data or _data_folder(path, tensor)
        _require_data(path, tensor, Path(tensor.base_dir), links=data is None)
    if data is None:
        _follow_links(model)
    return model


def save_onnx(model: ir.Model, path: Path, accept: Callable[[Path], bool] = lambda _: True) -> int:
    """Write `model`, with its weights beside it in `<name>.data` if they do not fit; return the bytes written.

    An older file is kept until the new one is complete and `accept` returns True for it; return 0 if it is rejected.
    """
    weights = sum(tensor.nbytes for tensor in tensors_of(model))
    beside = f"{path.name}.data" if weights > PROTOBUF_LIMIT - ROOM_FOR_THE_GRAPH else None
    try:
        with unfinished(path, folder=True) as folder:
            if beside is None:
                _map_data(model)
            ir.save(model, folder / path.name, format="protobuf", external_data=beside)
            files = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
            written = sum(file.stat().st_size for file in files)
            if not accept(folder / path.name):
                return 0
            for file in files:  # the graph last, after the file it refers to
                file.replace(path.parent / file.name)
    except OSError as error:
        raise CpcompileError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    return written


def tensors_of(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """All tensors of the model: the initializers of every graph and the constants."""
    return (tensor for tensor, _ in _stored(model))


def _stored(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, ir.Value | None]]:
    """All tensors, with the value that nodes read each as."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value, value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                    yield attribute.as_tensor(), node.outputs[0] if node.op_type == "Constant" else None


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The tensors whose data is in other files."""
    return (tensor for tensor in tensors_of(model) if isinstance(tensor, ir.ExternalTensor))


def opset_of(model: ir.Model | ir.Graph) -> int:
    """The version of the ONNX standard that `model` is written in; 0 if it uses none."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def module_of(node: ir.Node) -> str:
    """`: pkg.Decoder/layers.0: pkg.Layer/layers.0.ffn: pkg.FeedForward/linear: aten.linear` -> `layers.0.ffn`.

    A property that is already a path is returned unchanged; without one, and for the whole model, the path is empty.
    """
    namespace = node.metadata_props.get(MODULE, "")
    if ":" not in namespace:
        return "" if namespace.startswith(NO_MODULE) else namespace
    parts = [part.split(":")[0].strip() for part in namespace.split("/")]
    return next((part for part in reversed(parts[:-1]) if part and not part.startswith(NO_MODULE)), "")


def _follow_links(model: ir.Model) -> None:
    """Refer to data that has several names by where it is, because onnx_ir reads no links and no hard links."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(tensor := value.const_value, ir.ExternalTensor):
                value.const_value = _at_its_place(tensor)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _at_its_place(attribute.value))


def _at_its_place(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    data = Path(tensor.path)
    if data.stat().st_nlink == 1 and data.resolve().is_relative_to(Path(tensor.base_dir).resolve()):
        return tensor
    return ir.ExternalTensor(
        str(data.resolve()),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _map_data(model: ir.Model) -> None:
    """Replace external tensors by mapped tensors of this model, so that they are stored inside its file."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(tensor := value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _data_folder(path: Path, tensor: ir.ExternalTensor) -> Path:
    """Beside the model; or beside what the model is a link to, if the data is only there."""
    beside, real = path.parent, path.resolve().parent
    return real if not (beside / tensor.location).exists() and (real / tensor.location).exists() else beside


def _require_data(path: Path, tensor: ir.ExternalTensor, folder: Path, *, links: bool) -> None:
    """UsageError unless the data of `tensor` is in `folder`, possibly as one of the `links` there, and long enough."""
    data = Path(tensor.path)
    inside = not Path(tensor.location).is_absolute() and ".." not in Path(tensor.location).parts
    if not inside or not (links or data.resolve().is_relative_to(folder.resolve())):
        raise UsageError(f"{path}: the tensor {tensor.name} refers to {data}, outside of {folder}; it is refused")
    if not data.is_file():
        raise UsageError(f"{path}: the weights file {data} of the tensor {tensor.name} is missing; put it back")
    require_fetched(data)
    end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    if tensor.length is not None and tensor.length < tensor.nbytes:
        raise UsageError(
            f"{path}: the tensor {tensor.name} has {tensor.nbytes:,} bytes, and the file says that {tensor.length:,} "
            "are stored; export it again"
        )
    if (tensor.offset or 0) < 0 or end > data.stat().st_size:
        raise UsageError(
            f"{path}: the tensor {tensor.name} needs the bytes up to {end:,} of {data}, "
            f"which has {data.stat().st_size:,}: the file is truncated or a different one; copy it again"
        )


def size_of(model: ir.Model) -> Size:
    """The nodes of all graphs, and the elements and bytes of all tensors."""
    stored = list(_stored(model))
    return Size(
        nodes=sum(1 for graph in model.graphs() for _ in graph),
        parameters=sum(parameters_in(tensor, value) for tensor, value in stored),
        bytes=sum(tensor.nbytes for tensor, _ in stored),
    )
