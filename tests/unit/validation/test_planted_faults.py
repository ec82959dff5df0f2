"""Engines with one fault each, as a defect of the compiler or a careless hand would leave them: all are caught."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from cpcompile.bundle.manifest import PROVIDER_OPTIONS
from cpcompile.bundle.reader import Bundle
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import CpcompileError
from cpcompile.core.selection import UnitKind
from cpcompile.core.types import Feeds
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.report.results import VariantResult
from cpcompile.runtime.engine import create_session, load_engine, session_options
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.parity import check_parity
from cpcompile.validation.reference import Outputs, Run, Timed
from cpcompile.validation.speed import measure_speed
from cpcompile.validation.validator import validate
from tests.unit.validation.conftest import CONFIG, KEPT, MakeBundle

SHAPES = ((1, 1), (2, 8))
QUICK = ValidateConfig(shapes=SHAPES, speed_shapes=((1, 8),), threads=1, memory=False, speed=False, coherence=False)
Change = Callable[[ir.Graph], None]


@pytest.fixture
def judged(make_bundle: MakeBundle, checkpoint: Checkpoint, held_out) -> Callable[..., VariantResult]:
    """judged(change): what the validator says of the engine of `de` whose graph went through `change`."""

    def judge(change: Change | None, config: ValidateConfig = QUICK) -> VariantResult:
        bundle = make_bundle(change, {"de": 0})
        reference = LanguageReference(checkpoint, None, config, held_out=held_out, sequence=16)
        ((result,),) = validate(bundle, reference, config).values()
        return result

    return judge


def _change_weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(graph: ir.Graph) -> None:
        value = graph.initializers[name]
        array = change(value.const_value.numpy().copy()).astype(np.float32)
        value.const_value = ir.tensor(array, name=name)

    return apply


def _perturbed(array: np.ndarray) -> np.ndarray:
    """By a thousandth of each element, up or down."""
    return array * (1 + 1e-3 * np.random.default_rng(0).choice([-1.0, 1.0], array.shape))


def _without_a_kept_unit(down: np.ndarray) -> np.ndarray:
    """The columns of the first block that the context keeps, as if it had been removed too."""
    block = int(np.flatnonzero(KEPT[UnitKind.FFN][0, 1])[0])
    down[:, block * CONFIG.align : (block + 1) * CONFIG.align] = 0
    return down


def _other_gate(graph: ir.Graph) -> None:
    """In one place of several: the heads of the first layer are those of the other context."""
    table = graph.initializers["layers.0.head_gate.table"].const_value.numpy()
    assert not np.array_equal(table[0], table[1])
    _change_weight("layers.0.head_gate.table", lambda rows: rows[::-1].copy())(graph)


def _other_activation(graph: ir.Graph) -> None:
    """HardSigmoid for Sigmoid, in one layer: off by no more than 0.07 anywhere."""
    (first, *_) = (node for node in graph if node.op_type == "Sigmoid")
    hard = ir.node("HardSigmoid", first.inputs, attributes={"alpha": 1 / 6, "beta": 0.5})
    ir.convenience.replace_nodes_and_values(graph, first, [first], [hard], first.outputs, hard.outputs)


def _late_queries(graph: ir.Graph) -> None:
    """The queries of the first layer turn as if they stood one position further on; the keys stay where they are.

    (Both together would be no fault: rotary attention depends on distances alone.)
    """
    cos, sin = (next(node for node in graph if node.op_type == name) for name in ("Cos", "Sin"))
    angles = cos.inputs[0]
    (turn,) = (v for n, v in graph.initializers.items() if n == "frequencies")
    twice = ir.node("Concat", [turn, turn], attributes={"axis": -1})
    later = ir.node("Add", [angles, twice.outputs[0]])
    late_cos, late_sin = (ir.node(name, [later.outputs[0]]) for name in ("Cos", "Sin"))
    graph.insert_after(sin, [twice, later, late_cos, late_sin])
    for old, new in ((cos, late_cos), (sin, late_sin)):
        use = next(iter(old.outputs[0].uses()))
        use.node.replace_input_with(use.idx, new.outputs[0])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            _change_weight("layers.1.ffn.up.weight", _perturbed),
            id="weight off by a thousandth",
            marks=pytest.mark.slow,
        ),
        pytest.param(_change_weight("layers.1.ffn.down.weight", _without_a_kept_unit), id="a unit too many removed"),
        pytest.param(_other_gate, id="gate of another context"),
        pytest.param(_other_activation, id="another activation", marks=pytest.mark.slow),
        pytest.param(_late_queries, id="wrong rotary offset", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_computation_misses_parity(fault: Change, judged: Callable[..., VariantResult]) -> None:
    parity = judged(fault).parity
    assert parity.verdict == "fail"
    assert "exceeds the tolerance" in parity.reason
    assert parity.max_abs_error_float64 > 2 * parity.tolerance


def test_the_engine_without_a_fault_passes(judged: Callable[..., VariantResult]) -> None:
    assert judged(None).parity.verdict == "pass"


def test_gelu_by_tanh_is_not_gelu() -> None:
    """They differ by no more than 5e-4; the tolerance is far below."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 16, generator=generator)

    def model(dtype: torch.dtype, approximate: str) -> Run:
        def run(feeds: Feeds) -> Outputs:
            hidden = torch.from_numpy(feeds["x"]).to(dtype) @ weight.to(dtype)
            return {"y": torch.nn.functional.gelu(hidden, approximate=approximate).numpy()}

        return run

    inputs = [{"x": torch.randn(8, 16, generator=generator).numpy()}]
    for approximate, verdict in (("none", "pass"), ("tanh", "fail")):
        engine = model(torch.float32, approximate)
        exact = (model(torch.float32, "none"), model(torch.float64, "none"))
        parity = check_parity(engine, *exact, inputs, 8, logits=None, missing="")
        assert parity.verdict == verdict, parity


def test_one_position_that_is_no_number_is_counted(judged: Callable[..., VariantResult], held_out) -> None:
    token = int(held_out["de"][0])

    def spoil(table: np.ndarray) -> np.ndarray:
        table[token] = np.nan
        return table

    parity = judged(_change_weight("embedding.weight", spoil)).parity
    assert parity.verdict == "fail" and "NaN or infinite" in parity.reason


def test_an_output_of_another_name_is_named(judged: Callable[..., VariantResult]) -> None:
    def rename(graph: ir.Graph) -> None:
        graph.outputs[0].name = "scores"

    parity = judged(rename).parity
    assert parity.verdict == "fail" and "has the outputs ['scores'], expected exactly ['logits']" in parity.reason


@pytest.mark.parametrize("provider", PROVIDER_OPTIONS)
def test_a_provider_that_is_not_there_is_no_other_provider(bundle: Bundle, provider: str) -> None:
    """ONNX Runtime itself falls back, with a warning or without."""
    (variant,) = bundle.variants("de")
    wanted = dataclasses.replace(variant, provider=provider)
    with pytest.raises(CpcompileError, match=f"needs {provider}[;,] .*`cpcompile doctor` says what"):
        create_session(wanted, session_options(wanted))


def test_an_engine_that_sleeps_misses_the_demanded_ratio(bundle: Bundle) -> None:
    """It takes half as long again as its twin."""
    plain, pause = load_engine(bundle, "de", threads=1).outputs, 0.004

    def sleeping(seconds: float) -> Run:
        def run(feeds: Feeds) -> Outputs:
            time.sleep(seconds)
            return plain(feeds)

        return run

    inputs = [Timed(1, 8, {"input_ids": np.zeros((1, 8), dtype=np.int64)})]
    for seconds, verdict in ((pause, "pass"), (1.5 * pause, "fail")):
        engine, twin = sleeping(seconds), sleeping(pause)
        speed = measure_speed(engine, twin, inputs, rounds=20, threads=1, least_ratio=0.85, settle=0)
        assert speed.verdict == verdict, speed
