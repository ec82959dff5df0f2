"""Rounded weights in graphs: what the engine computes, what contexts share, and what stays as it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from cpcompile.core.cache import INPUT, OUTPUT, complete
from cpcompile.core.errors import CpcompileError
from cpcompile.core.rounding import QUANTIZED, SCHEMES
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.exporters.onnxruntime_exporter import export_onnxruntime
from cpcompile.frontend.capture import capture
from cpcompile.models.decoder import Decoder
from cpcompile.models.language_model import LanguageModel
from cpcompile.passes.dequantize_weights import DequantizeWeights
from cpcompile.passes.derived_parameters import Derivation
from cpcompile.passes.freeze import Frozen, freeze
from cpcompile.passes.quantized_parameters import NothingToRoundError
from cpcompile.passes.share_weights import Whole
from cpcompile.pipeline.cpu_engines import fused_for_cpu, quantize, round_parameters
from cpcompile.validation.rounded_model import Rounding
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder
from tests.unit.passes.graph_text import check, parse
from tests.unit.passes.test_caches import PRETRAINED, pretrained

IDS = np.random.default_rng(0).integers(0, 512, (2, 9))
EXACT = {"session.x64quantprecision": "1"}
EXACT_INPUTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Where ONNX Runtime finds weights in 4 bits that are dequantised, it would round inputs on its own."""


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Pairs of neighbouring units are kept together, so that blocks of 32 channels are whole."""
    decoder = random_decoder(2, 5)
    rng = np.random.default_rng(1)
    kept = {}
    for units in decoder.units():
        if units.kind is UnitKind.FFN:
            pairs = rng.random((len(CONTEXTS), units.layers, units.count // 2)) < 0.5
            pairs[..., 0] = True
            kept[units.kind] = pairs.repeat(2, axis=-1)
        elif units.kind is UnitKind.HEAD:
            kept[units.kind] = np.ones((len(CONTEXTS), units.layers, units.count), dtype=bool)
            kept[units.kind][1, 0, 1] = False
    decoder.select(Selection(CONTEXTS, kept))
    return decoder


def wholes(model: LanguageModel, frozen: Frozen) -> dict[str, Whole]:
    """The parameters as `frozen` has their axes."""
    found = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        array = array.transpose(frozen.permutations.get(name, range(array.ndim)))
        found[name] = Whole(array.shape, partial(np.asarray, array))
    return found


def quantized(model: LanguageModel, frozen: Frozen, precision: str) -> tuple[ir.Model, Derivation]:
    copy, whole = frozen.model.clone(), wholes(model, frozen)
    kept = {name: axes for name, axes in frozen.kept.items() if name in whole}
    result = quantize(precision, kept, whole)(copy)
    assert isinstance(result, Derivation)
    return copy, result


def logits(graph: ir.Model, ids: np.ndarray = IDS) -> np.ndarray:
    options = ort.SessionOptions()
    for key, value in (EXACT | EXACT_INPUTS).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes = {each.name: each.shape for each in session.get_inputs()}
    return session.run([OUTPUT], complete({INPUT: ids}, shapes))[0]


def eager(
    model: LanguageModel, index: int, schemes: Mapping[str, str] | None = None, ids: np.ndarray = IDS
) -> np.ndarray:
    with torch.inference_mode():
        if schemes is None:
            return model(torch.from_numpy(ids), torch.tensor(index)).numpy()
        with Rounding(model, {name: SCHEMES[scheme] for name, scheme in schemes.items()}):
            return model(torch.from_numpy(ids), torch.tensor(index)).numpy()


@pytest.mark.parametrize("precision", SCHEMES)
def test_engines_compute_what_the_rounded_eager_model_does(model: Decoder, precision: str) -> None:
    dynamic = dynamic_graph(model, 23, cached=True)
    for index in range(len(CONTEXTS)):
        graph, _ = quantized(model, freeze(dynamic, index), precision)
        fused = fused_for_cpu(graph)
        check(fused)
        schemes = json.loads(fused.metadata_props[QUANTIZED])
        assert set(schemes.values()) == {precision} and "embedding.weight" in schemes
        assert not any(node.op_type == "MatMul" for node in graph.graph)
        own, rounded, unrounded = logits(fused), eager(model, index, schemes), eager(model, index)
        # A sum that float32 rounds differently may take an input to the next whole number, but not all of them.
        assert np.abs(own - rounded).mean() < 0.05 * np.abs(own - unrounded).mean()
        largest = {"int4-weights": 0.5, "int7": 0.1}.get(precision, 0.05)
        assert np.abs(own - unrounded).mean() < largest * unrounded.std()


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in PRETRAINED if kind != "llama")]
)
def test_pretrained_models_are_rounded_by_their_own_names(kind: str) -> None:
    """GPT-2 multiplies by weights that lie the other way round, and looks positions up in a table."""
    model = pretrained(kind)
    dynamic, ids = capture(model, cached=True), np.random.default_rng(0).integers(3, 96, (2, 7))
    for precision in SCHEMES:
        graph, _ = quantized(model, freeze(dynamic, 1), precision)
        schemes = json.loads(graph.metadata_props[QUANTIZED])
        own, rounded = logits(fused_for_cpu(graph), ids), eager(model, 1, schemes, ids)
        # One input that is rounded to the next whole number moves all logits after it.
        assert np.abs(own - rounded).mean() < 0.3 * np.abs(own - eager(model, 1, ids=ids)).mean(), precision


def test_contexts_cut_the_same_numbers(model: Decoder) -> None:
    dynamic = dynamic_graph(model, 23, cached=True)
    for precision in SCHEMES:
        for index in range(len(CONTEXTS)):
            graph, result = quantized(model, freeze(dynamic, index), precision)
            assert result.parameters and result.parameters.keys() <= graph.graph.initializers.keys()
            for name, derived in result.parameters.items():
                array = derived.whole.read()
                assert array.shape == derived.whole.shape, name
                for axis, indices in enumerate(derived.kept):
                    if indices is not None:
                        array = array.take(indices, axis=axis)
                tensor = graph.graph.initializers[name].const_value
                assert (
                    tensor is not None and tensor.dtype.numpy() == array.dtype and tensor.shape.numpy() == array.shape
                )
                np.testing.assert_array_equal(tensor.numpy(), array)


def test_a_text_is_computed_as_in_a_batch_where_blocks_are_scaled(model: Decoder) -> None:
    frozen = freeze(dynamic_graph(model, 23, cached=True), 0)
    for precision in ("int8-weights", "int4-weights"):
        graph = fused_for_cpu(quantized(model, frozen, precision)[0])
        np.testing.assert_allclose(logits(graph)[1:], logits(graph, IDS[1:]), atol=1e-5)


def test_products_with_one_input_round_it_once(model: Decoder) -> None:
    graph, _ = quantized(model, freeze(dynamic_graph(model, 23, cached=True), 0), "int8")
    count = Counter(node.op_type for node in graph.graph)
    assert (count["MatMulInteger"], count["DynamicQuantizeLinear"]) == (2 * 7 + 1, 2 * 4 + 1)


@pytest.mark.parametrize("precision", ["int8", "int7"])
def test_the_largest_sums_are_exact(precision: str, tmp_path: Path) -> None:
    """Without VNNI, x64 adds up two products in 16 bits: those of weights in 7 bits fit, the others need an option."""
    graph = parse("(float[2, 64] x) => (float[2, 4] y) { y = MatMul(x, w) }", {"w": (64, 4)})
    kept, whole = {"w": (None, None)}, {"w": Whole((64, 4), lambda: np.ones((64, 4), np.float32))}
    quantize(precision, kept, whole)(graph)
    artifact = export_onnxruntime(graph, tmp_path, weights=None, locations={}, precision=precision)
    assert artifact.session_options == (EXACT if precision == "int8" else {})
    options = ort.SessionOptions()
    for key, value in artifact.session_options.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(tmp_path / artifact.model_file, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((2, 64), np.float32)})
    np.testing.assert_allclose(y, 64, rtol=1e-5)


def test_a_parameter_whose_blocks_are_cut_stays(model: Decoder) -> None:
    """A unit of the nano decoder has 16 channels, half a block."""
    other = random_decoder(2, 5)
    kept = {}
    for units in other.units():
        if units.kind in (UnitKind.FFN, UnitKind.HEAD):
            kept[units.kind] = np.ones((len(CONTEXTS), units.layers, units.count), dtype=bool)
    kept[UnitKind.FFN][0, 0, 3] = False
    other.select(Selection(CONTEXTS, kept))
    frozen = freeze(dynamic_graph(other, 23, cached=True), 0)
    graph, _ = quantized(other, frozen, "int8-weights")
    left = [node.inputs[1].name for node in graph.graph if node.op_type == "MatMul"]
    assert left == ["layers.0.ffn.down.weight"]
    assert "layers.0.ffn.down.weight" not in json.loads(graph.metadata_props[QUANTIZED])
    schemes = json.loads(graph.metadata_props[QUANTIZED])
    assert np.abs(logits(graph) - eager(other, 0, schemes)).max() < 0.05 * logits(graph).std()


@pytest.mark.parametrize("precision", SCHEMES)
def test_nothing_to_round_is_an_error(precision: str) -> None:
    graph = parse("(float[2, 32] x, float[32, 4] w) => (float[2, 4] y) { y = MatMul(x, w) }")
    with pytest.raises(CpcompileError, match=f"it has no product with a weight that {precision} could round"):
        quantize(precision, {}, {})(graph)


def test_a_scheme_may_have_nothing_to_do_if_another_has() -> None:
    """The inputs of `v` do not fall into blocks, so that only `w` is rounded; with `v` alone there is nothing."""
    text = "(float[2, 32] x) => (float[2, 4] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    shapes = {"w": (32, 40), "v": (40, 4)}
    graph = parse(text, shapes)
    whole = {name: Whole(shape, partial(np.zeros, shape, np.float32)) for name, shape in shapes.items()}
    kept = dict.fromkeys(shapes, (None, None))
    left = round_parameters(graph, kept, dict(whole), {"w": "int8", "v": "int4-weights"})
    assert json.loads(graph.metadata_props[QUANTIZED]) == {"w": "int8"} and "v" in left
    with pytest.raises(NothingToRoundError, match="could round in blocks of 32 input channels"):
        round_parameters(parse(text, shapes), kept, dict(whole), {"v": "int4-weights"})


def test_dequantized_weights_are_those_of_the_rounded_eager_model(model: Decoder) -> None:
    """ONNX Runtime computes what TensorRT reads, with inputs as they are."""
    dynamic = dynamic_graph(model, 23, cached=True)
    scheme = replace(SCHEMES["int4-weights"], products_only=True)
    for index in range(len(CONTEXTS)):
        frozen = freeze(dynamic, index)
        graph, whole = frozen.model.clone(), wholes(model, frozen)
        kept = {name: axes for name, axes in frozen.kept.items() if name in whole}
        DequantizeWeights(scheme.name, kept, whole)(graph)
        check(graph)
        rounded = json.loads(graph.metadata_props[QUANTIZED])
        assert "embedding.weight" in rounded and not np.allclose(logits(graph), eager(model, index), atol=1e-2)
        with torch.inference_mode(), Rounding(model, dict.fromkeys(rounded, scheme)):
            expected = model(torch.from_numpy(IDS), torch.tensor(index)).numpy()
        np.testing.assert_allclose(logits(graph), expected, atol=1e-4)
