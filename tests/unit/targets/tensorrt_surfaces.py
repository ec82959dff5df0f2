"""The names that TensorRT's Python bindings have, release by release: writes tests/data/tensorrt_api.json.

    bindings wheel (PyPI) -> unpack -> empty libraries beside it -> import -> dir() of every class

The bindings are a native module that needs libnvinfer, which PyPI does not have. It takes nine functions from there and
calls none of them on import, so that a library of nine empty functions is enough to read every name. Needs `cc`,
`readelf` and the network:

    python tests/unit/targets/tensorrt_surfaces.py
"""

import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

TABLE = Path(__file__).parents[2] / "data" / "tensorrt_api.json"
WHEELS = {
    "tensorrt 10.14": "tensorrt-cu12-bindings==10.14.1.48.post1",  # the oldest that pyproject.toml allows
    "tensorrt 10.16": "tensorrt-cu12-bindings==10.16.1.11",
    "tensorrt 11.0": "tensorrt-cu12-bindings==11.0.0.114",
    "tensorrt 11.4": "tensorrt-cu12-bindings==11.4.0.106",
    "tensorrt_rtx 1.7": "tensorrt-rtx-cu13-bindings==1.7.1.116",
}
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LEFT_OUT = re.compile(r"\w*Plugin|IV\d|I?SymExpr|DimsExprs|IDimensionExpr|IExprBuilder|IAlgorithm|Calibration|IInt8")
"""Plugins and calibrators, which are not used: networks come from ONNX in their own types."""

Surface = Mapping[str, list[str]]
"""The public names of each class, and under the empty name those of the module."""


def surface_of(module: object) -> Surface:
    """The names of an imported binding."""
    found: dict[str, list[str]] = {"": [name for name in _public(module) if not _is_module(module, name)]}
    classes = {name: getattr(module, name) for name in found[""]}
    while classes:
        name, kind = classes.popitem()
        if not inspect.isclass(kind):
            continue
        found[name] = _public(kind)
        inner = {each: inspect.getattr_static(kind, each) for each in found[name]}
        classes |= {f"{name}.{each}": value for each, value in inner.items() if inspect.isclass(value)}
    return {name: names for name, names in sorted(found.items()) if not LEFT_OUT.match(name)}


def merge(surfaces: Mapping[str, Surface]) -> dict[str, dict[str, str]]:
    """class -> releases, divided by commas -> the names that these and no others have, divided by spaces."""
    table = {}
    for kind in sorted({name for surface in surfaces.values() for name in surface}):
        rows: dict[str, list[str]] = {}
        for name in sorted({name for surface in surfaces.values() for name in surface.get(kind, ())}):
            having = [release for release, surface in surfaces.items() if name in surface.get(kind, ())]
            rows.setdefault("all" if len(having) == len(surfaces) else ", ".join(having), []).append(name)
        table[kind] = {releases: " ".join(names) for releases, names in rows.items()}
    return table


def read_table() -> dict[str, dict[str, set[str]]]:
    """release -> class -> its names."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))

    def names(rows: Mapping[str, str], release: str) -> set[str]:
        return {
            name for key, text in rows.items() if key == "all" or release in key.split(", ") for name in text.split()
        }

    return {
        release: {kind: names(rows, release) for kind, rows in content["classes"].items()}
        for release in content["wheels"]
    }


def _public(thing: object) -> list[str]:
    return sorted(name for name in dir(thing) if not name.startswith("_"))


def _is_module(thing: object, name: str) -> bool:
    return inspect.ismodule(getattr(thing, name)) or bool(LEFT_OUT.match(name))


def _read_wheel(requirement: str, folder: Path) -> Surface:
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement)
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    (library,) = folder.glob("*_bindings/*.so")
    dynamic = subprocess.run(("readelf", "-d", library), check=True, capture_output=True, text=True).stdout
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS), encoding="ascii")
    for name in re.findall(r"NEEDED.*\[(lib(?:nv|tensorrt)\S+)\]", dynamic):
        subprocess.run(("cc", "-shared", "-fPIC", "-o", library.with_name(name), source), check=True)
    command = (sys.executable, __file__, str(folder), library.parent.name)
    # Only some releases have the module's own folder in their runpath.
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={"LD_LIBRARY_PATH": str(library.parent)}
    )
    read: Surface = json.loads(done.stdout)
    return read


def _write_table() -> None:
    surfaces = {}
    for release, requirement in WHEELS.items():
        with tempfile.TemporaryDirectory() as folder:
            surfaces[release] = _read_wheel(requirement, Path(folder))
    source = f"dir() of the classes in these wheels from PyPI, by {Path(__file__).name}"
    rows = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(names)}" for kind, names in merge(surfaces).items())
    head = f' "source": {json.dumps(source)},\n "wheels": {json.dumps(WHEELS)}'
    TABLE.write_text(f'{{\n{head},\n "classes": {{\n{rows}\n }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.path.insert(0, sys.argv[1])
        print(json.dumps(surface_of(importlib.import_module(sys.argv[2]))))
    else:
        _write_table()
