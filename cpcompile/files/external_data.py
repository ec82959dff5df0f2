"""Find the bytes of other files that an ONNX model refers to, and copy them into it: in protobuf's wire format.

Installations that only run and export engines have no onnx.

The files that an engine makes its runtime open must be known before the runtime gets it. Only the messages that lead
to tensors are entered; everything else, above all the weights, is skipped and never read. It is stricter than protobuf
where that is simpler: groups, which ONNX does not use, are refused. What a parser may merge (a message given twice)
is visited twice, so no reference is missed. Sources: protobuf.dev, Encoding; onnx.proto; ONNX, docs/ExternalData.md.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cpcompile.core.errors import CpcompileError, UsageError

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf file can hold."""
MAX_DEPTH = 100
"""The deepest nesting of messages, as in protobuf's own parsers."""

# Message -> field number -> message. `Tensor.13` holds the references.
MESSAGES = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
KEY, VALUE = 1, 2
DIMS, DATA_TYPE, NAME, ENTRIES = 1, 2, 8, 13
"""The fields of a tensor that are read."""
RAW_DATA = 9
INITIALIZER, INPUTS = 5, 11
VALUES = {INPUTS: "inputs", 12: "outputs"}
"""Fields of a graph."""
VALUE_NAME = 1
DATA_INSIDE = b"\x70\x00"
"""`data_location: DEFAULT`; of a field that is given twice, the last one counts."""
Bytes = mmap.mmap | memoryview


@dataclass(frozen=True)
class Reference:
    """The part of another file that holds a tensor; `length` is None where the model does not give it."""

    location: str
    offset: int
    length: int | None
    name: str = ""
    dims: tuple[int, ...] = ()
    data_type: int = 0
    """Its number in TensorProto.DataType."""


def references_of(model: Path) -> tuple[Reference, ...]:
    """Every reference in the file `model`, in order; UsageError if it is not protobuf or a reference is malformed."""
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return tuple(
                _reference(entries, _name(data, start, end), _dims(data, start, end), _type(data, start, end))
                for start, end in _tensors(data, 0, len(data), "Model", 0)
                if (entries := [_entry(data, s, e) for number, s, e in _fields(data, start, end) if number == ENTRIES])
            )
    except OSError as error:
        raise UsageError(f"{model}: cannot be read ({error.strerror}); build the bundle again") from error
    except ValueError as error:  # mmap raises it for an empty file
        raise UsageError(f"{model}: is not a valid ONNX model ({error}); build the bundle again") from error


@dataclass(frozen=True)
class Detached:
    """A model without the bytes of other files: initializers that lie there became inputs of the graph."""

    model: bytes
    inputs: tuple[str, ...]
    """The names of the inputs that the graph had before."""
    outputs: tuple[str, ...]
    references: tuple[Reference, ...]
    """What the new inputs, of the same names, have to be given."""


def detach_data(model: Path) -> Detached:
    """The model in the file `model`, for a runtime that shall open no other file.

    UsageError: it is not ONNX, or a tensor that is no initializer of the main graph lies in another file.
    """
    detached = _Detaching()
    try:
        content = b"".join(detached.model(_mapped(model)))
    except OSError as error:
        raise UsageError(f"{model}: cannot be read ({error.strerror}); build the bundle again") from error
    except ValueError as error:
        raise UsageError(f"{model}: is not a valid ONNX model ({error}); build the bundle again") from error
    if len(detached.references) != len(references_of(model)):
        raise UsageError(f"{model}: a tensor that is no initializer lies in another file; build the bundle again")
    inputs, outputs = tuple(detached.names["inputs"]), tuple(detached.names["outputs"])
    return Detached(content, inputs, outputs, tuple(detached.references))


def embed_data(model: Path, folder: Path, out: Path) -> None:
    """Write the model in the file `model` to `out`, with the bytes that it refers to, of files in `folder`, in it.

    `references_of` says which they are; whoever calls this has checked them. CpcompileError: the result is too large.
    """
    parts = _whole(model, folder)
    if (size := sum(map(len, parts))) > PROTOBUF_LIMIT:
        raise CpcompileError(f"{model}: has {size:,} bytes with its weights; one file holds {PROTOBUF_LIMIT:,} at most")
    with out.open("wb") as file:
        file.writelines(parts)


def content_digest(model: Path, folder: Path) -> str:
    """The SHA-256 of the model as `embed_data` would write it, however large: wherever its weights lie."""
    digest = hashlib.sha256()
    for part in _whole(model, folder):
        digest.update(part)
    return digest.hexdigest()


def _whole(model: Path, folder: Path) -> list[bytes | memoryview]:
    """The parts of the model, in which tensors hold their bytes; files are mapped."""
    files: dict[Path, memoryview] = {}

    def read(reference: Reference) -> memoryview:
        path = folder / reference.location
        if path not in files:
            files[path] = _mapped(path)
        whole = files[path]
        end = len(whole) if reference.length is None else reference.offset + reference.length
        if not reference.offset <= end <= len(whole):
            raise ValueError(f"a tensor needs the bytes up to {end:,} of {path}, which has {len(whole):,}")
        return whole[reference.offset : end]

    try:
        return list(_embedded(_mapped(model), "Model", 0, read))
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror}); build the bundle again") from error
    except ValueError as error:
        raise UsageError(f"{model}: is not a valid ONNX model ({error}); build the bundle again") from error


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _embedded(
    data: memoryview, message: str, depth: int, read: Callable[[Reference], memoryview]
) -> Iterator[bytes | memoryview]:
    """The parts of a message whose tensors hold what they refer to; everything else is copied."""
    if depth > MAX_DEPTH:
        raise ValueError(f"messages are nested more than {MAX_DEPTH} deep")
    begin, entries = 0, []
    for number, wire, start, end in _walk(data, 0, len(data)):
        kind = MESSAGES[message].get(number) if wire == BYTES else None
        if kind is None:
            yield data[begin:end]
        elif kind == "Entry":
            entries.append(_entry(data, start, end))
        else:
            inner = list(_embedded(data[start:end], kind, depth + 1, read))
            yield _head(number, sum(map(len, inner)))
            yield from inner
        begin = end
    if entries:
        content = read(_reference(entries))
        yield from (_head(RAW_DATA, len(content)), content, DATA_INSIDE)


def _head(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return _encoded(number << 3 | BYTES) + _encoded(length)


def _encoded(value: int) -> bytes:
    """`value` as a varint."""
    low = bytearray()
    while value > 0x7F:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*low, value])


class _Detaching:
    """What is found while a model is copied without its references."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {"inputs": [], "outputs": []}
        self.references: list[Reference] = []

    def model(self, data: memoryview) -> Iterator[bytes | memoryview]:
        """The parts of the message `Model`."""
        begin = 0
        for number, wire, start, end in _walk(data, 0, len(data)):
            if wire == BYTES and MESSAGES["Model"].get(number) == "Graph":
                yield _field(number, *self._graph(data[start:end]))
            else:
                yield data[begin:end]
            begin = end

    def _graph(self, data: memoryview) -> Iterator[bytes | memoryview]:
        begin = 0
        for number, wire, start, end in _walk(data, 0, len(data)):
            part: bytes | memoryview = data[begin:end]
            if wire == BYTES and number in VALUES:
                self.names[VALUES[number]].append(_value_name(data, start, end))
            if wire == BYTES and number == INITIALIZER:
                entries = [_entry(data, s, e) for field, s, e in _fields(data, start, end) if field == ENTRIES]
                if entries:
                    shape, kind = _dims(data, start, end), _type(data, start, end)
                    self.references.append(_reference(entries, _name(data, start, end), shape, kind))
                    part = _field(INPUTS, _value_info(self.references[-1]))
            yield part
            begin = end


def _value_name(data: memoryview, start: int, end: int) -> str:
    return "".join(bytes(data[s:e]).decode() for number, s, e in _fields(data, start, end) if number == VALUE_NAME)


def _value_info(reference: Reference) -> bytes:
    """`name` and `type` of an input that takes the place of a tensor. Source: onnx.proto, ValueInfoProto."""
    shape = b"".join(_field(1, _number(1, length)) for length in reference.dims)
    return _field(VALUE_NAME, reference.name.encode()) + _field(
        2, _field(1, _number(1, reference.data_type) + _field(2, shape))
    )


def _field(number: int, *content: bytes | memoryview) -> bytes:
    """A length-delimited field."""
    whole = b"".join(content)
    return _head(number, len(whole)) + whole


def _number(number: int, value: int) -> bytes:
    """An integer field."""
    return _encoded(number << 3) + _encoded(value)


def _tensors(data: Bytes, start: int, end: int, message: str, depth: int) -> Iterator[tuple[int, int]]:
    """Start and end of the tensors within a message."""
    if depth > MAX_DEPTH:
        raise ValueError(f"messages are nested more than {MAX_DEPTH} deep")
    if message == "Tensor":
        yield start, end
        return
    for number, inner, inner_end in _fields(data, start, end):
        if (kind := MESSAGES[message].get(number)) is not None:
            yield from _tensors(data, inner, inner_end, kind, depth + 1)


def _name(data: Bytes, start: int, end: int) -> str:
    return "".join(bytes(data[s:e]).decode() for number, s, e in _fields(data, start, end) if number == NAME)


def _dims(data: Bytes, start: int, end: int) -> tuple[int, ...]:
    """The dimensions, which writers may pack into one field."""
    dims = [value for number, value in _numbers(data, start, end) if number == DIMS]
    for number, position, stop in _fields(data, start, end):
        while number == DIMS and position < stop:
            value, position = _varint(data, position, stop)
            dims.append(value)
    return tuple(dims)


def _type(data: Bytes, start: int, end: int) -> int:
    return sum(value for number, value in _numbers(data, start, end) if number == DATA_TYPE)


def _reference(
    entries: list[tuple[str, str]], name: str = "", dims: tuple[int, ...] = (), data_type: int = 0
) -> Reference:
    given = dict(entries)
    if len(given) != len(entries):
        raise ValueError("a tensor has two locations")
    if not given.get("location"):
        raise ValueError("a tensor is in another file that is not named")
    if wrong := [
        key for key in ("offset", "length") if not (text := given.get(key, "0")).isascii() or not text.isdigit()
    ]:
        raise ValueError(f"the {wrong[0]} of a tensor is {given[wrong[0]][:40]!r}")
    if max(len(given.get(key, "")) for key in ("offset", "length")) > 20:
        raise ValueError("the offset or length of a tensor exceeds 64 bits")
    length = int(given["length"]) if "length" in given else None
    return Reference(given["location"], int(given.get("offset", 0)), length, name, dims, data_type)


def _entry(data: Bytes, start: int, end: int) -> tuple[str, str]:
    texts = {KEY: b"", VALUE: b""}
    for number, inner, inner_end in _fields(data, start, end):
        if number in texts:
            texts[number] = bytes(data[inner:inner_end])
    return texts[KEY].decode(), texts[VALUE].decode()


def _fields(data: Bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each length-delimited field of a message."""
    return ((number, at, stop) for number, wire, at, stop in _walk(data, start, end) if wire == BYTES)


def _numbers(data: Bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Number and value of each integer field of a message."""
    return ((number, value) for number, wire, value, _ in _walk(data, start, end) if wire == VARINT)


def _walk(data: Bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number and wire type of each field of a message; then start and end of its content, or an integer and the end."""
    while start < end:
        tag, start = _varint(data, start, end)
        number, wire = tag >> 3, tag & 7
        if number == 0 or tag >= 1 << 32:
            raise ValueError(f"no field can have the number {number}")
        if wire == VARINT:
            value, start = _varint(data, start, end)
            yield number, wire, value, start
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
            if size <= end - start:
                yield number, wire, start, start + size
            start += size
        elif wire == BYTES:
            length, start = _varint(data, start, end)
            if length <= end - start:
                yield number, wire, start, start + length
            start += length
        else:
            raise ValueError(f"a field has the wire type {wire}")
        if start > end:
            raise ValueError("it is truncated, or a length in it is wrong")


def _varint(data: Bytes, start: int, end: int) -> tuple[int, int]:
    value = 0
    for shift, position in enumerate(range(start, min(end, start + 10))):
        byte = data[position]
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, position + 1
    raise ValueError("it is truncated, or a number in it has no end")
