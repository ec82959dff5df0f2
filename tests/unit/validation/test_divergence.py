"""First divergence: every planted fault has its node, and graphs that only round differently have none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.files.onnx_file import MODULE
from cpcompile.passes.bind_context import BindContext
from cpcompile.passes.freeze import freeze
from cpcompile.passes.share_weights import ShareWeights, plan_runs
from cpcompile.passes.strip_metadata import StripMetadata
from cpcompile.validation.divergence import ROUNDINGS, find_divergence, layer_errors, write_repro
from cpcompile.validation.lockstep import run_in_lockstep
from cpcompile.validation.output_comparison import compare_arrays
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import Array, parse

TEXT = """(float[N,8] x) => (float[N,4] y) {
    h = MatMul(x, a)
    s = Add(h, bias)
    g = Gelu(s)
    m = Mul(g, gate)
    y = MatMul(m, b)
}"""
RNG = np.random.default_rng(0)
WEIGHTS: Mapping[str, Array] = {
    "a": RNG.standard_normal((8, 6)),
    "bias": RNG.standard_normal(6),
    "gate": np.array([1.0, 0, 1, 1, 0, 1]),
    "b": RNG.standard_normal((6, 4)),
}
X = {"x": RNG.standard_normal((5, 8)).astype(np.float32)}
NAN = np.where(np.arange(6) == 2, np.nan, WEIGHTS["bias"])


def perturbed(array: Array) -> Array:
    noise = np.random.default_rng(1).standard_normal(array.shape)
    return np.asarray(array * (1 + 1e-3 * noise), dtype=array.dtype)


FAULTS: Mapping[str, tuple[str, Mapping[str, Array], str, str]] = {
    "weights": (TEXT, {"b": perturbed(WEIGHTS["b"])}, "MatMul", "y differs by"),
    "another-gate": (TEXT, {"gate": np.array([1.0, 1, 0, 1, 0, 1])}, "Mul", "m differs by"),
    "constant": (TEXT, {"bias": WEIGHTS["bias"] + 0.01}, "Add", "s differs by"),
    "tanh": (TEXT.replace("Gelu(s)", 'Gelu <approximate = "tanh"> (s)'), {}, "Gelu", "g differs by"),
    "nan": (TEXT, {"bias": NAN}, "Add", "s is not finite where the original is"),
    "wiring": (TEXT.replace("MatMul(m, b)", "MatMul(g, b)"), {}, "MatMul", "y differs by"),
    "fewer-channels": (TEXT, {"a": WEIGHTS["a"][:, :1]}, "MatMul", "h is float32 [5, 1] instead of float32 [5, 6]"),
    "does-not-fit": (TEXT, {"b": WEIGHTS["b"][:5]}, "MatMul", "y cannot be computed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_has_its_node(fault: str) -> None:
    text, weights, operator, says = FAULTS[fault]
    found = find_divergence(parse(TEXT, WEIGHTS), parse(text, {**WEIGHTS, **weights}, infer=False), X)
    assert found is not None
    assert (found.operator, found.value) == (operator, says[0]) and says in str(found)
    assert (found.max_abs_error is not None) == ("differs" in says)
    if found.max_abs_error is not None:
        assert found.max_abs_error > 10 * found.tolerance
    assert set(found.inputs) <= set("xhsgm")


def test_a_sound_graph_has_none_and_every_value_is_compared() -> None:
    assert find_divergence(parse(TEXT, WEIGHTS), parse(TEXT, WEIGHTS), X) is None
    assert [pair.name for pair in run_in_lockstep(parse(TEXT, WEIGHTS), parse(TEXT, WEIGHTS), X)] == list("hsgmy")


def test_all_kinds_of_nodes_run_alone() -> None:
    text = """(float[N,8] x) => (float[N,8] y) {
        halves = SplitToSequence <axis = 1> (x, sizes)
        left = SequenceAt(halves, zero)
        total = ReduceSum <keepdims = 0> (left)
        positive = Greater(total, limit)
        y = If (positive) <
            then_branch = p () => (float[N,8] r) { r = Mul(x, w) },
            else_branch = q () => (float[N,8] n) { n = Neg(x) }
        >
    }"""
    weights = {"sizes": np.array([4, 4]), "zero": np.array(0), "limit": np.array(-1e9), "w": WEIGHTS["a"][:, 0]}
    names = [pair.name for pair in run_in_lockstep(parse(text, weights), parse(text, weights), X)]
    assert names == ["left", "total", "positive", "y"]
    found = find_divergence(parse(text, weights), parse(text, weights | {"w": perturbed(weights["w"])}), X)
    assert found is not None and (found.operator, found.value) == ("If", "y")


SUMS = TEXT.replace(
    "y = MatMul(m, b)",
    "left, right = Split <axis = 1, num_outputs = 2> (m) p = MatMul(left, b0) q = MatMul(right, b1) y = Add(p, q)",
)


def test_nodes_of_the_engines_own_are_candidates() -> None:
    pieces = {"b0": WEIGHTS["b"][:3], "b1": perturbed(WEIGHTS["b"][3:])}
    found = find_divergence(parse(TEXT, WEIGHTS), parse(SUMS, {**WEIGHTS, **pieces}), X)
    assert found is not None and (found.operator, found.value) == ("MatMul", "y")  # what it is in the reference
    assert [name.split()[0] for name in found.candidates] == ["Split", "MatMul", "MatMul", "Add"]
    assert set(found.inputs) == {"m"}
    pieces["b1"] = WEIGHTS["b"][3:]
    assert find_divergence(parse(TEXT, WEIGHTS), parse(SUMS, {**WEIGHTS, **pieces}), X) is None


def test_cancellation_is_no_fault() -> None:
    """Terms a million times the result: two orders of a sum differ by more than roundings of the largest result."""
    rng = np.random.default_rng(2)
    half = rng.standard_normal((300, 4))
    weights = {"w": np.concatenate([1e6 * half, -1e6 * half + rng.standard_normal((300, 4))])}
    x = rng.standard_normal((5, 300)).astype(np.float32)
    feeds = {"x": np.concatenate([x, x], axis=1)}
    whole = parse("(float[N,600] x) => (float[N,4] y) { y = MatMul(x, w) }", weights)
    text = """(float[N,600] x) => (float[N,4] y) {
        l, r = Split <axis = 1, num_outputs = 2> (x) p = MatMul(l, w0) q = MatMul(r, w1) y = Add(p, q)
    }"""
    sums = parse(text, {"w0": weights["w"][:300], "w1": weights["w"][300:]})
    (pair,) = run_in_lockstep(whole, sums, feeds)
    assert compare_arrays("y", pair.expected, pair.expected, pair.got, roundings=ROUNDINGS).reason is not None
    assert find_divergence(whole, sums, feeds) is None


def test_a_constant_of_the_engine_is_compared_with_what_the_reference_computes(tmp_path: Path) -> None:
    text = "(float[N,6] x) => (float[N,6] y) { gate = Gather(table, context) y = Mul(x, gate) }"
    table = np.array([[1.0, 0, 1, 1, 0, 1], [1.0, 1, 0, 0, 1, 1]])
    reference = parse(text, {"table": table, "context": np.array(0)})
    feeds = {"x": np.ones((2, 6), dtype=np.float32)}
    baked = "(float[N,6] x) => (float[N,6] y) { y = Mul(x, gate) }"
    assert find_divergence(reference, parse(baked, {"gate": table[0]}), feeds) is None
    found = find_divergence(reference, parse(baked, {"gate": table[1]}), feeds)
    assert found is not None and (found.operator, found.value) == ("Gather", "gate")
    with pytest.raises(CpcompileError, match="no node to run"):
        write_repro(found, tmp_path / "repro")


def test_the_repro_runs_as_its_readme_says(tmp_path: Path) -> None:
    text, weights, *_ = FAULTS["weights"]
    found = find_divergence(parse(TEXT, WEIGHTS), parse(text, {**WEIGHTS, **weights}), X)
    folder = write_repro(found, tmp_path / "repro")
    readme = (folder / "README.txt").read_text()
    assert str(found)[1:] in readme
    code = readme.split("python -c '\n")[1].rsplit("'", maxsplit=1)[0]
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert float(printed.stdout.split()[-1]) == pytest.approx(found.max_abs_error, rel=1e-5)
    assert write_repro(found, folder) == folder
    (folder / "mine.txt").touch()
    with pytest.raises(UsageError, match=r"holds mine\.txt"):
        write_repro(found, folder)
    with pytest.raises(UsageError, match="cannot be written"):
        write_repro(found, folder / "mine.txt" / "below")


def test_errors_add_up_from_layer_to_layer() -> None:
    reference = parse(TEXT, WEIGHTS)
    for node, module in zip(reference.graph, ("f.up", "f.up", "f", "f", "g"), strict=True):
        node.metadata_props[MODULE] = module
    sound = layer_errors(reference, parse(TEXT, WEIGHTS), X)
    assert [(e.module, e.value, e.max_abs_error) for e in sound] == [
        ("f.up", "s", 0.0),
        ("f", "m", 0.0),
        ("g", "y", 0.0),
        ("", "y", 0.0),
    ]
    faulty = layer_errors(reference, parse(TEXT, {**WEIGHTS, "bias": WEIGHTS["bias"] + 0.01}), X)
    assert faulty[0].max_abs_error == pytest.approx(0.01, rel=1e-4)
    assert faulty[-1].max_abs_error > 1e-3 and faulty[-1].largest == sound[-1].largest > 1
    assert [e.max_abs_error for e in layer_errors(reference, parse(TEXT, {**WEIGHTS, "bias": NAN}), X)] == [None] * 4


def test_an_input_that_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="the input 'x'"):
        find_divergence(parse(TEXT, WEIGHTS), parse(TEXT, WEIGHTS), {})


def test_a_reference_that_cannot_be_run_is_an_error() -> None:
    with pytest.raises(CpcompileError, match="reference cannot be run at its node"):
        find_divergence(parse(TEXT, {**WEIGHTS, "b": WEIGHTS["b"][:5]}, infer=False), parse(TEXT, WEIGHTS), X)


Engine = Callable[[int], ir.Model]
IDS = {"input_ids": np.random.default_rng(3).integers(0, 512, (2, 11))}


class Nano:
    """A nano decoder: the graph of context b frozen and bound, and its engine with shared weights on disk."""

    def __init__(self, opset: int, folder: Path) -> None:
        model = random_decoder(2, 7)
        self.selection = model.sort_units(random_selection(model, 7))
        self.model, self.opset = model, opset
        self.dynamic = self.captured(self.selection)
        self.frozen = freeze(self.dynamic, 1).model
        self.bound = self.dynamic.clone()
        for each in (BindContext(1), StripMetadata()):
            each(self.bound)
        self.path = folder / "engine.onnx"
        ir.save(self._shared(), self.path, external_data="weights.bin")

    def captured(self, selection: Selection) -> ir.Model:
        self.model.select(selection)
        return dynamic_graph(self.model, self.opset)

    def engine(self) -> ir.Model:
        return ir.load(self.path)

    def _shared(self) -> ir.Model:
        frozen = {context: freeze(self.dynamic, index) for index, context in enumerate(CONTEXTS)}
        names = [name for name, _ in self.model.named_parameters() if not name.endswith("_gate.table")]
        kept = {c: {n: f.kept[n] for n in names if n in f.kept} for c, f in frozen.items()}
        orders = {name: order for f in frozen.values() for name, order in f.permutations.items()}
        shapes = {}
        for name in {n for own in kept.values() for n in own}:
            shape = self.dynamic.graph.initializers[name].const_value.shape.numpy()
            shapes[name] = [shape[axis] for axis in orders.get(name, range(len(shape)))]
        engine = frozen["b"].model
        assert ShareWeights("b", plan_runs(kept, shapes))(engine).modified
        return engine


@pytest.fixture(scope="module", params=[pytest.param(20, marks=pytest.mark.slow), 23])
def nano(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Nano:
    return Nano(request.param, tmp_path_factory.mktemp("nano"))


def test_a_sound_engine_has_no_divergence(nano: Nano) -> None:
    assert find_divergence(nano.frozen, nano.engine(), IDS) is None
    assert find_divergence(nano.bound, nano.engine(), IDS, sliced=True) is None
    layers = {error.module: error for error in layer_errors(nano.bound, nano.engine(), IDS, sliced=True)}
    assert {"embedding", "layers.0.attention", "layers.1", "layers.1.ffn", ""} <= set(layers)
    assert 0 < layers[""].max_abs_error < 1e-5 * layers[""].largest


def change(model: ir.Model, name: str, edit: Callable[[Array], Any]) -> None:
    """Edit an initializer, or all pieces of it."""
    names = [own for own in model.graph.initializers if own == name or own.startswith(f"{name}[")]
    for own in names:
        value = model.graph.initializers[own]
        array = value.const_value.numpy()
        value.const_value = ir.tensor(np.asarray(edit(array), dtype=array.dtype), name=own)
    assert names


WEIGHT_OF = {
    "layers.1.ffn.down.weight": "layers.1.ffn",
    "layers.0.attention.value.weight": "layers.0.attention",
    "embedding.weight": "embedding",
    "layers.1.ffn_norm.weight": "layers.1.ffn_norm",
}


@pytest.mark.parametrize("name", WEIGHT_OF)
def test_a_perturbed_weight_is_found_in_its_module(nano: Nano, name: str) -> None:
    engine = nano.engine()
    change(engine, name, perturbed)
    for reference, sliced in ((nano.frozen, False), (nano.bound, True)):
        found = find_divergence(reference, engine, IDS, sliced=sliced)
        assert found is not None and found.module == WEIGHT_OF[name], str(found)
        assert found.max_abs_error > 2 * found.tolerance


def test_a_wrong_rope_offset_is_found(nano: Nano) -> None:
    engine = nano.engine()
    (positions,) = (node for node in engine.graph if node.op_type == "Range")
    change(engine, positions.inputs[0].name, lambda start: start + 1)
    change(engine, positions.inputs[2].name, lambda step: step)
    found = find_divergence(nano.frozen, engine, IDS)
    assert found is not None and found.operator == "Range"


def test_the_engine_of_another_context_is_found(nano: Nano) -> None:
    found = find_divergence(nano.frozen, freeze(nano.dynamic, 0).model, IDS)
    assert found is not None and found.module.startswith("layers.0")


def test_a_unit_too_many_is_found_without_a_frozen_reference(nano: Nano) -> None:
    """As if freezing itself had removed it: only the bound graph knows."""
    ffn = nano.selection.kept[UnitKind.FFN].copy()
    ffn[1, 1, np.flatnonzero(ffn[1, 1])[0]] = False
    fewer = freeze(nano.captured(Selection(CONTEXTS, {**nano.selection.kept, UnitKind.FFN: ffn})), 1).model
    found = find_divergence(nano.bound, fewer, IDS, sliced=True)
    assert found is not None and found.module == "layers.1.ffn" and found.operator == "MatMul"
    assert any(name.startswith("MatMul") for name in found.candidates)
