"""The archive of an exported program: nothing in it runs before it has been inspected."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpcompile.core.errors import UsageError
from cpcompile.core.types import Array, Feeds
from cpcompile.files.pointers import require_fetched
from cpcompile.files.whole_files import require_regular_file

FORMAT, VERSION = "cpcompile-program", 1
RECORD, EXAMPLES = "cpcompile.json", "examples.npz.base64"
"""The archive accepts only text, hence base64."""
OPERATORS = re.compile(r"(torch\.ops\.(aten|higher_order)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+)")
"""What a node may call. Other names would be looked up and called as Python functions."""
EXPRESSION = re.compile(r"([\w\s+\-*/%(),<>=!&|~]|'\w+')*")
"""Sizes as sympy writes them: without dots and brackets, evaluating one cannot reach anything else."""
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """
        Symbol Integer Rational Float Mul Add Pow Mod PythonMod FloorDiv CeilDiv CleanDiv IntTrueDiv FloatTrueDiv
        PowByNatural FloatPow Max Min Abs floor ceiling CeilToInt FloorToInt TruncToInt RoundToInt ToFloat Identity
        ModularIndexing Where Piecewise ExprCondPair And Or Not Eq Ne Equality Unequality LessThan GreaterThan
        StrictLessThan StrictGreaterThan
        """,
    )
)
"""The functions that a size may call."""
READS_FILES = "torch.ops.aten.from_file"
MEMBER = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/.+|\.data/[a-z_]+|archive_[a-z]+|byteorder|version",
    re.ASCII,
)
"""The members that are allowed: torch.export.load runs others, such as data/aotinductor/, and ignores case."""
TENSOR = re.compile(r"(weight|tensor)_\d+", re.ASCII)
"""Files with the bytes of a tensor; others are unpickled."""


def inspect_program(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Feeds, ...]]]:
    """Our own files of the archive, after checking what torch.export.load would run."""
    require_regular_file(path, "a program is a file such as model.pt2")
    require_fetched(path)
    try:
        archive = _open_archive(path)
        names = archive.get_all_records()
        if f"extra/{RECORD}" not in names:
            raise UsageError(
                f"{path}: has no record of gates; partition the model and write it with `cpcompile.save_program`"
            )
        for name in names:
            if not MEMBER.fullmatch(name):
                raise _refused(path, name)
            if name.startswith("models/"):
                _require_harmless_graph(path, json.loads(archive.get_record(name)))
            elif name.endswith("_config.json"):
                for entry in json.loads(archive.get_record(name))["config"].values():
                    if entry.get("use_pickle") or not TENSOR.fullmatch(entry["path_name"]):
                        raise _refused(path, f"the pickled tensor {entry.get('path_name')}")
            elif name.endswith(".pt"):
                _require_plain(path, name, archive.get_record(name))
        record = json.loads(archive.get_record(f"extra/{RECORD}"))
        if record.get("format") != FORMAT or record.get("version") != VERSION:
            raise UsageError(
                f"{path}: program version {record.get('version')!r}, this cpcompile reads {VERSION}; save it again"
            )
        examples = base64.b64decode(archive.get_record(f"extra/{EXAMPLES}"))
        with np.load(io.BytesIO(examples), allow_pickle=False) as arrays:
            return record, _examples(dict(arrays))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file; `cpcompile.save_program` writes one") from error
    except PermissionError as error:
        raise UsageError(f"{path}: cannot be read (permission denied)") from error
    except (
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
        RuntimeError,
    ) as e:
        raise damaged(path, e) from e


def _open_archive(path: Path) -> torch._C.PyTorchFileReader:
    """Torch's own reader, after the checks that it does not make: every reader must see the same archive."""
    with zipfile.ZipFile(path) as archive:
        there = sorted((entry.filename.partition("/")[2], entry.file_size) for entry in archive.infolist())
        if sum(size for _, size in there) > path.stat().st_size:
            raise zipfile.BadZipFile("it holds more than it has bytes")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("a checksum is wrong")
    reader = torch._C.PyTorchFileReader(str(path))
    read = sorted((name, reader.get_record_size(name)) for name in reader.get_all_records())
    if read != there or len(dict(read)) < len(read):
        raise zipfile.BadZipFile("it has a file twice, or two directories")
    return reader


def _require_harmless_graph(path: Path, node: Any) -> None:
    """Refuse operators other than those of ATen, expressions beyond arithmetic, and containers that are imported."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            waiting.extend(node.values())
            target = node.get("target")
            harmless = OPERATORS.fullmatch(str(target)) and not str(target).startswith(READS_FILES)
            if isinstance(target, str) and "inputs" in node and not harmless:
                raise _refused(path, f"a call of {target}")
            for key in ("expr_str", "as_expr"):
                text = node.get(key)
                if isinstance(text, str) and not _is_arithmetic(text):
                    raise _refused(path, f"the expression {text[:60]!r}")
            waiting.extend(json.loads(node[key]) for key in ("in_spec", "out_spec") if node.get(key))
            if "children_spec" in node and "{" in str(node.get("context")):
                raise _refused(path, f"the container {str(node.get('type'))[:60]!r}")


def _is_arithmetic(text: str) -> bool:
    """Whether `text` has only words, numbers and calls of FUNCTIONS by name: `(exec)('x')` does not."""
    calls = set(re.findall(r"([\w)']+)\s*\(", text))
    return EXPRESSION.fullmatch(text) is not None and calls <= FUNCTIONS


def _require_plain(path: Path, name: str, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # many kinds of error, all of which mean that it is not plain
        raise _refused(path, name) from error


def _refused(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path}: refused, because loading it would run code that the file brings along ({what}); "
        "save it again with `cpcompile.save_program`"
    )


def damaged(path: Path, error: Exception) -> UsageError:
    """The error to raise when `error` stopped the reading of `path`."""
    reason = (str(error) or type(error).__name__).split("\n", maxsplit=1)[0]
    return UsageError(f"{path}: is not a torch.export program or is damaged ({reason}); copy or save it again")


def _examples(arrays: Mapping[str, Array]) -> dict[str, tuple[Feeds, ...]]:
    """The examples of every context, from arrays named `context/number/input`."""
    found: dict[str, dict[int, dict[str, Array]]] = {}
    for key, array in arrays.items():
        context, number, name = key.split("/", maxsplit=2)
        found.setdefault(context, {}).setdefault(int(number), {})[name] = array
    return {context: tuple(feeds for _, feeds in sorted(runs.items())) for context, runs in found.items()}
