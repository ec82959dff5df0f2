"""Plans of TensorRT-RTX, built for real; it needs no GPU for that. What runs them is tested where there is one."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.bundle.artifact import Artifact
from cpcompile.core.cache import present_of
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.exporters.tensorrt_exporter import (
    PLAN_FILE,
    build_plan,
    export_tensorrt,
    profiles_of,
    timing_cache,
)
from cpcompile.files.onnx_file import MODULE
from cpcompile.models.decoder import Decoder
from cpcompile.passes.freeze import freeze
from cpcompile.passes.legalize_for_tensorrt import LegalizeForTensorRT
from cpcompile.passes.lower_precision import HALVES, LowerPrecision
from cpcompile.pipeline.write_engines import legal_for_plans
from cpcompile.targets.plan_info import Profile
from cpcompile.targets.requests import Range, Target, parse_target
from cpcompile.targets.tensorrt_library import load_library, logger_of
from tests.unit.passes.decoders import dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import parse

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'cpcompile[tensorrt-rtx]'")

RTX = parse_target("tensorrt-rtx")
FLAT = (Profile(name="default", shapes={"x": ((1, 8), (4, 8), (16, 8))}),)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Both layers have heads and an FFN."""
    model = random_decoder(kv_heads=2, seed=1)
    model.select(random_selection(model, seed=5))
    return model


@pytest.fixture(scope="module")
def frozen(decoder: Decoder) -> ir.Model:
    return frozen_to(decoder, 23)


def frozen_to(decoder: Decoder, opset: int) -> ir.Model:
    """In opset 20 attention is spelled out, in 23 it is one operator."""
    return freeze(dynamic_graph(decoder, opset), 0).model


def export(model: ir.Model, folder: Path, precision: str = "fp16", **more: Any) -> Artifact:
    """The plan of `model` in `folder`, which has nothing else."""
    model = model.clone()
    LegalizeForTensorRT()(model)
    if precision in HALVES:
        LowerPrecision(precision)(model)
    folder.mkdir(exist_ok=True)
    settings = {"target": RTX, "ranges": {}, "sequence": 32} | more
    artifact = export_tensorrt(model, folder, precision=precision, **settings)
    assert [path.name for path in folder.iterdir()] == [PLAN_FILE]
    return artifact


def write(path: Path, text: str, **weights: np.ndarray) -> Path:
    model = ir.to_proto(parse(text, weights, infer=False))
    for node in model.graph.node:
        node.name = node.name or f"node_{node.output[0]}"
    onnx.save(model, path)
    return path


def refused(onnx_file: Path, **more: Any) -> str:
    """The one error of a build, which leaves nothing behind."""
    before = sorted(onnx_file.parent.iterdir())
    with pytest.raises(CpcompileError) as raised:
        build_plan(onnx_file, onnx_file.with_suffix(".plan"), load_library(RTX.flavour), RTX, FLAT, **more)
    assert sorted(onnx_file.parent.iterdir()) == before
    message = str(raised.value)
    assert "\n" not in message and len(message) < 800
    return message


@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.slow), 23])
def test_every_precision_for_three_generations(decoder: Decoder, frozen: ir.Model, opset: int, tmp_path: Path) -> None:
    model = frozen if opset == 23 else frozen_to(decoder, opset)
    sizes = {}
    for precision, logits in (("fp32", "float32"), ("fp16", "float32"), ("bf16", "float32")):
        steps: list[tuple[int, int]] = []
        folder = tmp_path / precision
        artifact = export(model, folder, precision, progress=lambda *step, s=steps: s.append(step))
        assert steps and steps == sorted(steps) and steps[-1][0] <= steps[-1][1]
        assert (artifact.variant, artifact.runtime) == (f"tensorrt-rtx-{precision}", "tensorrt-rtx")
        info = artifact.plan
        assert info is not None and info.version == load_library("tensorrt-rtx").__version__
        assert info.capabilities == ("sm86", "sm89", "sm120")
        assert [(t.name, t.is_input, t.dtype, t.shape) for t in info.tensors] == [
            ("input_ids", True, "int64", ("batch", "sequence")),
            ("logits", False, logits, ("batch", "sequence", 512)),
        ]
        assert dict(info.profiles[0].shapes) == {"input_ids": ((1, 1), (1, 32), (8, 128))}
        sizes[precision] = (folder / PLAN_FILE).stat().st_size
    assert sizes["fp16"] < sizes["fp32"] and sizes["bf16"] < sizes["fp32"]


def test_one_plan_holds_for_all_compute_capabilities(frozen: ir.Model, tmp_path: Path) -> None:
    sizes = []
    for name in ("sm86", "sm86,sm89,sm120"):
        export(frozen, tmp_path / name, target=parse_target(f"tensorrt-rtx={name}"))
        sizes.append((tmp_path / name / PLAN_FILE).stat().st_size)
    assert 0 <= sizes[1] - sizes[0] < 1000


def test_the_same_input_has_the_same_digests(tmp_path: Path) -> None:
    model = parse("(float[batch,sequence,8] x) => (float[batch,sequence,8] y) { y = MatMul(x, w) }", {"w": (8, 8)})
    first, second, other = (
        export(model, tmp_path / name, ranges={"sequence": Range(1, 8, most)}).plan
        for name, most in (("a", 32), ("b", 32), ("c", 64))
    )
    assert first is not None and second is not None and other is not None
    assert first == second and first.settings_digest == second.settings_digest
    assert other.onnx_digest == first.onnx_digest and other.settings_digest != first.settings_digest
    model.graph.initializers["w"].const_value = ir.tensor(np.eye(8, dtype=np.float32), name="w")
    changed = export(model, tmp_path / "d", ranges={"sequence": Range(1, 8, 32)}).plan
    assert changed is not None and changed.onnx_digest != first.onnx_digest
    assert changed.settings_digest == first.settings_digest


CACHED = """(float[batch,2,sequence,64] q, float[batch,2,sequence,64] k, float[batch,2,sequence,64] v,
    float[batch,2,past,64] past_k, float[batch,2,past,64] past_v)
    => (float[batch,2,sequence,64] y, float[batch,2,total,64] new_k, float[batch,2,total,64] new_v)
    { y, new_k, new_v = Attention(q, k, v, , past_k, past_v) }"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cache_has_a_profile_for_the_prompt_and_one_for_the_tokens_after_it(precision: str, tmp_path: Path) -> None:
    info = export(parse(CACHED), tmp_path / "out", precision, ranges={"past": Range(1, 64, 512)}).plan
    assert info is not None
    prefill, decode = info.profiles
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes["q"] == ((1, 2, 1, 64), (1, 2, 32, 64), (8, 2, 128, 64))
    assert prefill.shapes["past_k"] == ((1, 2, 0, 64), (1, 2, 0, 64), (8, 2, 0, 64))
    assert decode.shapes["q"] == ((1, 2, 1, 64), (1, 2, 1, 64), (8, 2, 1, 64))
    assert decode.shapes["past_v"] == ((1, 2, 1, 64), (1, 2, 64, 64), (8, 2, 512, 64))
    assert [tensor.name for tensor in info.tensors] == ["q", "k", "v", "past_k", "past_v", "y", "new_k", "new_v"]


def test_the_plan_of_a_language_model_has_its_cache(decoder: Decoder, tmp_path: Path) -> None:
    frozen = freeze(dynamic_graph(decoder, 23, cached=True), 0).model
    info = export(legal_for_plans(frozen, "fp16"), tmp_path / "out", "fp16").plan
    assert info is not None
    prefill, decode = info.profiles
    heads = next(tensor.shape[1] for tensor in info.tensors if tensor.name.startswith("past"))
    prompt, token = ((1, 1), (1, 32), (8, 128)), ((1, 1), (1, 1), (8, 1))
    assert prefill.shapes["input_ids"] == prefill.shapes["attention_mask"] == prompt
    assert decode.shapes["input_ids"] == decode.shapes["position_ids"] == token
    assert decode.shapes["attention_mask"] == ((1, 2), (1, 33), (8, 129))
    pasts = [name for name in decode.shapes if name.startswith("past_key_values")]
    assert pasts and "logits_to_keep" not in decode.shapes
    width = decoder.config.head_dim
    assert decode.shapes[pasts[0]] == ((1, heads, 1, width), (1, heads, 32, width), (8, heads, 128, width))
    assert {tensor.name for tensor in info.tensors if not tensor.is_input} == {
        "logits",
        *(present_of(name) for name in pasts),
    }


SIDE = 1024
SCALE = np.array(0.05)
QUANTISED = {
    "int8": (
        """{ xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)
             wd = DequantizeLinear<axis = 1>(w, each) y = MatMul(xd, wd) }""",
        {"s": SCALE, "z": np.zeros((), np.int8), "each": np.full(SIDE, 0.05)},
        np.int8,
    ),
    "int4 in blocks": (
        "{ wd = DequantizeLinear<axis = 0, block_size = 32>(w, each) y = MatMul(x, wd) }",
        {"each": np.full((SIDE // 32, SIDE), 0.05)},
        ml_dtypes.int4,
    ),
    "float8": (
        """{ xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)
             wd = DequantizeLinear(w, s) y = MatMul(xd, wd) }""",
        {"s": SCALE, "z": np.zeros((), ml_dtypes.float8_e4m3fn)},
        ml_dtypes.float8_e4m3fn,
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_stay_quantised(kind: str, precision: str, tmp_path: Path) -> None:
    body, weights, dtype = QUANTISED[kind]
    w = np.random.default_rng(0).integers(-7, 8, (SIDE, SIDE)).astype(dtype)
    model = parse(f"(float[batch,{SIDE}] x) => (float[batch,{SIDE}] y) {body}", {**weights, "w": w})
    export(model, tmp_path / "out", precision, target=parse_target("tensorrt-rtx=sm89,sm120"))
    assert (tmp_path / "out" / PLAN_FILE).stat().st_size < 0.75 * 2 * SIDE * SIDE  # of two bytes an element
    if kind == "float8":
        with pytest.raises(
            CpcompileError, match="Cannot compile for target.s. sm86, .*fp8_e4m3.*leave this target out"
        ):
            export(model, tmp_path / "older", precision)


def test_axes_without_a_usual_range_are_asked_for() -> None:
    model = parse("(float[frames,8] x) => (float[frames,8] y) { y = Exp(x) }")
    with pytest.raises(UsageError, match="'frames' has no usual range; give --profile frames=min:opt:max"):
        profiles_of(model, {}, 32)
    with pytest.raises(UsageError, match="--profile tokens: the inputs have no such axis; the dynamic axes are frames"):
        profiles_of(model, {"tokens": Range(1, 2, 3), "frames": Range(1, 2, 3)}, 32)
    nameless = parse("(float[?,8] x) => (float[?,8] y) { y = Exp(x) }")
    with pytest.raises(UsageError, match="the input x: an axis has neither a length nor a name"):
        profiles_of(nameless, {}, 32)
    fixed = parse("(float[3,8] x) => (float[3,8] y) { y = Exp(x) }")
    assert profiles_of(fixed, {}, None)[0].shapes["x"] == ((3, 8),) * 3
    with pytest.raises(UsageError, match="no axis is dynamic"):
        profiles_of(fixed, {"batch": Range(1, 1, 1)}, None)


class TestRefusals:
    """Each is one sentence; the library's own output goes nowhere else."""

    @pytest.mark.parametrize("content", [b"", b"no onnx", bytes(range(256)) * 40])
    def test_garbage_that_the_parser_accepts(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(content)
        message = refused(tmp_path / "model.onnx")
        assert "cannot read model.onnx: " in message
        assert "it is damaged or not ONNX" in message or "Failed to parse the ONNX model" in message

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "model.onnx", "(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", w=np.ones((8, 8))
        )
        path.write_bytes(path.read_bytes()[:-40])
        assert "tensorrt_rtx" in refused(path)

    def test_missing_external_data(self, tmp_path: Path) -> None:
        text = "(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }"
        ir.save(parse(text.replace("8", "64"), {"w": (64, 64)}), tmp_path / "model.onnx", external_data="w.bin")
        (tmp_path / "w.bin").unlink()
        assert "w.bin" in refused(tmp_path / "model.onnx")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("(float[N,8] x) => (float[N] y) { y = other.Foo(x) }", "cannot read Foo node_y (module layers.0.foo): "),
            ("(float[N,8] x) => (float[N,8] y) { y = Det(x) }", "cannot read Det node_y (module layers.0.foo)"),
            ("(float[N,8] x, float16[N,8] z) => (float[N,8] y) { y = Add(x, z) }", "must have same input types"),
            ("(float[N,8] x) => (float[8,N,8] y) { y = Transpose<perm=[2,0,1]>(x) }", "cannot read Transpose node_y"),
            ("(float[N,8] x) => (float[N,8] y) { y = Gemm(x, w, c) }", "Gemm node_y (module layers.0.foo)"),
        ],
        ids=["no such operator", "unsupported operator", "wrong dtype", "wrong rank", "wrong shapes"],
    )  # fmt: skip
    def test_a_graph_that_is_refused_names_node_and_module(self, text: str, says: str, tmp_path: Path) -> None:
        path = write(tmp_path / "model.onnx", text, w=np.ones((5, 8)), c=np.ones(3))
        assert says in refused(path, modules={"node_y": "layers.0.foo"})

    def test_a_profile_of_the_wrong_rank(self, tmp_path: Path) -> None:
        path = write(tmp_path / "model.onnx", "(float[N,8,2] x) => (float[N,8,2] y) { y = Exp(x) }")
        message = refused(path)
        assert "the profile default has" in message and "for the input x of 3 axes" in message

    def test_a_profile_that_does_not_fit_the_graph(self, tmp_path: Path) -> None:
        path = write(tmp_path / "model.onnx", "(float[N,7] x) => (float[N,7] y) { y = Exp(x) }")
        assert "profile" in refused(path)

    def test_what_the_builder_refuses(self, frozen: ir.Model, tmp_path: Path) -> None:
        with pytest.raises(CpcompileError, match=r"FP32 GEMM is not supported.*module layers\.\d") as raised:
            export(frozen, tmp_path / "out", "fp32", target=parse_target("tensorrt-rtx=sm75"))
        assert raised.value.exit_code == 1
        assert not list((tmp_path / "out").iterdir())

    def test_an_unknown_compute_capability(self, frozen: ir.Model, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="does not build for sm90; it builds for sm75, sm80, sm86"):
            export(frozen, tmp_path / "out", target=parse_target("tensorrt-rtx=sm90"))
        assert not list((tmp_path / "out").iterdir())

    def test_a_library_that_is_not_there(self, frozen: ir.Model, tmp_path: Path) -> None:
        if importlib.util.find_spec("tensorrt") is not None:
            pytest.skip("tensorrt is installed here")
        with pytest.raises(UsageError, match=r"pip install 'cpcompile\[tensorrt\]'; `cpcompile doctor`"):
            export(frozen, tmp_path / "out", target=Target("tensorrt"))


def test_ctrl_c_ends_the_build_and_leaves_nothing(frozen: ir.Model, tmp_path: Path) -> None:
    """In a process of its own: the signal may arrive late, when it would end whatever runs the tests."""
    ir.save(frozen, tmp_path / "model.onnx")
    code = """
import os, signal, sys, time
from pathlib import Path
from cpcompile.exporters.tensorrt_exporter import build_plan
from cpcompile.targets.plan_info import Profile
from cpcompile.targets.requests import parse_target
from cpcompile.targets.tensorrt_library import load_library
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background of a shell
onnx, plan = map(Path, sys.argv[1:])
steps = []
def interrupt(done, total):
    if not steps:
        os.kill(os.getpid(), signal.SIGINT)
    steps.append((done, total))
def build(**more):
    profiles = (Profile(name="p", shapes={"input_ids": ((1, 1), (1, 8), (2, 16))}),)
    build_plan(onnx, plan, load_library("tensorrt-rtx"), parse_target("tensorrt-rtx"), profiles, **more)
try:
    build(progress=interrupt)
    time.sleep(60)
except KeyboardInterrupt:
    assert steps[-1][0] < steps[-1][1], "the signal came after the build"
assert os.listdir(plan.parent) == ["model.onnx"]
build()  # and the next one is not harmed
"""
    arguments = [sys.executable, "-X", "faulthandler", "-c", code]
    paths = [str(tmp_path / "model.onnx"), str(tmp_path / "engine.plan")]
    done = subprocess.run([*arguments, *paths], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "engine.plan").stat().st_size


def test_an_error_of_the_progress_display_is_not_swallowed(frozen: ir.Model, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise ValueError("the display broke")

    with pytest.raises(ValueError, match="the display broke"):
        export(frozen, tmp_path / "out", progress=fail)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_a_sentence(frozen: ir.Model, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; in a process of its own, which it also lets end in peace."""
    ir.save(frozen, tmp_path / "model.onnx")
    code = """
import resource, signal, sys
from pathlib import Path
from cpcompile.core.errors import CpcompileError
from cpcompile.exporters.tensorrt_exporter import build_plan
from cpcompile.targets.plan_info import Profile
from cpcompile.targets.requests import parse_target
from cpcompile.targets.tensorrt_library import load_library
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, -1))
onnx, plan = map(Path, sys.argv[1:])
profiles = (Profile(name="p", shapes={"input_ids": ((1, 1), (1, 8), (2, 16))}),)
try:
    build_plan(onnx, plan, load_library("tensorrt-rtx"), parse_target("tensorrt-rtx"), profiles)
except CpcompileError as error:
    sys.exit(str(error))
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "model.onnx"), str(tmp_path / "engine.plan")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "engine.plan: cannot be written (File too large); free space" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_older_plan_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", "(float[N,8] x) => (float[N,8] y) { y = Det(x) }")
    (tmp_path / "model.plan").write_bytes(b"the old one")
    refused(path)
    assert (tmp_path / "model.plan").read_bytes() == b"the old one"
    write(path, "(float[N,8] x) => (float[N,8] y) { y = Exp(x) }")
    build_plan(path, tmp_path / "model.plan", load_library("tensorrt-rtx"), RTX, FLAT)
    assert hashlib.sha256((tmp_path / "model.plan").read_bytes()).digest() != hashlib.sha256(b"the old one").digest()


def test_the_module_of_a_node_that_a_pass_added_is_known(frozen: ir.Model) -> None:
    model = frozen.clone()
    LowerPrecision("fp16")(model)
    casts = [node for node in model.graph if node.op_type == "Cast" and node.name.startswith("rms_norm")]
    assert casts and all(node.metadata_props[MODULE] for node in casts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorRT-RTX has the calls of TensorRT, and nothing to time
def test_timings_are_kept_for_the_next_build(tmp_path: Path) -> None:
    library, path = load_library("tensorrt-rtx"), tmp_path / "cache" / "timings"
    builder = library.Builder(logger_of(library))
    for before in (None, b"not what it was", b""):
        if before is not None:
            path.write_bytes(before)
        config = builder.create_builder_config()
        with timing_cache(config, path):
            assert config.get_timing_cache() is not None
        assert path.stat().st_size > len(before or b"")
    with timing_cache(builder.create_builder_config(), None):
        pass
    with pytest.raises(KeyError), timing_cache(builder.create_builder_config(), tmp_path / "failed"):
        raise KeyError("a build that fails keeps nothing")
    assert [each.name for each in tmp_path.rglob("*") if each.is_file()] == ["timings"]
