"""One code for TensorRT 10, 11 and TensorRT-RTX: every name of theirs that it uses is in the bindings of each."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpcompile.runtime.plan import TYPES
from tests.unit.targets.tensorrt_surfaces import WHEELS, read_table, surface_of

ROOT = Path(__file__).parents[3]
FILES = (
    "exporters/tensorrt_exporter.py",
    "cpcompile/targets/tensorrt_library.py",
    "cpcompile/runtime/plan.py",
    "cpcompile/doctor/trials.py",
)
LIBRARY = {"trt", "library", "_library"}
"""The names by which a TensorRT module is imported there."""
RTX = {"tensorrt_rtx 1.7"}
GUARDED: dict[str, set[str]] = {
    "ComputeCapability": RTX,
    "CudaGraphStrategy": RTX,
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE": RTX,
    "cuda_graph_strategy": RTX,
    "num_compute_capabilities": RTX,
    "set_compute_capability": RTX,
}
"""Names that only these releases have: used where the target says that it is one of them."""
TABLE = read_table()


def chain_of(node: ast.expr) -> tuple[str, ...] | None:
    """("ILogger", "Severity") of `library.ILogger.Severity` and of `self._library.ILogger.Severity`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        if node.attr in LIBRARY:
            return tuple(reversed(names))
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id in LIBRARY else None


def releases_with(chain: tuple[str, ...]) -> set[str]:
    return {release for release, classes in TABLE.items() if chain[-1] in classes.get(".".join(chain[:-1]), ())}


def releases_with_member(name: str) -> set[str]:
    """The releases in which any class has it: the class of an object is not known here."""
    return {release for release, classes in TABLE.items() if any(name in names for names in classes.values())}


def used(tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """Each name of the bindings in the code, and the releases that have it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("_"):
            continue
        chain = chain_of(node)
        if chain:
            yield ".".join(chain), releases_with(chain)
        elif chain is None and (found := releases_with_member(node.attr)):
            yield node.attr, found


NAMES = {name: found for file in FILES for name, found in used(ast.parse((ROOT / file).read_text(encoding="utf-8")))}


def test_the_table_has_all_three_libraries_and_what_facts_are_known_of_them() -> None:
    assert set(TABLE) == set(WHEELS)
    assert {release.split(".")[0] for release in TABLE} == {"tensorrt 10", "tensorrt 11", "tensorrt_rtx 1"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [*extras["tensorrt"], *extras["tensorrt-rtx"]] == ["tensorrt>=10.14", "tensorrt-rtx>=1.7"]  # the oldest here
    assert releases_with(("BuilderFlag", "FP16")) == {"tensorrt 10.14", "tensorrt 10.16"}
    assert releases_with(("Builder", "build_engine_with_config")) == set(TABLE) - RTX
    for chain in (("IExecutionContext", "execute_async_v3"), ("Builder", "build_serialized_network_to_stream")):
        assert releases_with(chain) == set(TABLE)


def test_the_code_uses_only_names_that_every_release_has() -> None:
    assert {"Builder", "execute_async_v3", "set_tensor_address", "ILogger.Severity.ERROR"} <= set(NAMES)
    assert {name: found for name, found in NAMES.items() if found != set(TABLE)} == GUARDED


@pytest.mark.parametrize(
    ("code", "name", "missing"),
    [
        ("library.BuilderFlag.FP16", "BuilderFlag.FP16", {"tensorrt 11.0", "tensorrt 11.4", *RTX}),
        ("self._library.NoSuchThing", "NoSuchThing", set(TABLE)),
        ("engine.device_memory_size", "device_memory_size", {"tensorrt 11.0", "tensorrt 11.4", *RTX}),
        ("trt.EngineValidity", "EngineValidity", set(TABLE) - RTX),
    ],
)
def test_a_name_that_is_not_everywhere_is_seen(code: str, name: str, missing: set[str]) -> None:
    found = dict(used(ast.parse(code)))
    assert set(TABLE) - found[name] == missing


def test_the_types_are_types_of_every_release() -> None:
    for release, classes in TABLE.items():
        assert set(TYPES) <= classes["DataType"], release


def test_the_table_is_what_the_installed_library_has() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    (release,) = RTX
    if not library.__version__.startswith(release.split()[1]):
        pytest.skip(f"the table is of {release}, installed is {library.__version__}")
    there = {kind: set(names) for kind, names in surface_of(library).items() if names}
    assert {kind: names for kind, names in TABLE[release].items() if names} == there
