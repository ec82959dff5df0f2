"""`model.pt2`: written and read again, the same model in every form; hostile archives are refused before they run."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.export import Dim

import cpcompile
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.frontend.program import Program, load_program
from cpcompile.frontend.program_archive import EXAMPLES, RECORD
from cpcompile.frontend.source import open_source
from cpcompile.partitioning import PartitionedModule, partition
from cpcompile.validation.program_reference import ProgramReference
from tests.unit.partitioning.models import ConvolutionNetwork, GatedConvolution, SharedWeights, randomise

TEXT = ({0: Dim("batch", min=1), 1: Dim("sequence", max=64)},)
MODELS: dict[str, Any] = {
    "convolution": (ConvolutionNetwork, torch.randn(3, 3, 8, 8), ({0: Dim("batch")},)),
    "gated": (GatedConvolution, torch.randn(2, 6, 16), TEXT),
    "shared": (SharedWeights, torch.randint(0, 40, (2, 6)), TEXT),
}


def squares(output: torch.Tensor, _inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output.square().flatten(1).mean(1).sum()


def made(name: str) -> tuple[PartitionedModule, Selection]:
    kind, example, shapes = MODELS[name]
    model = kind()
    randomise(model, 1)
    module = partition(model, (example,), contexts=2, dynamic_shapes=shapes, align=4)
    batches = {"day": [(example,)], "night": [(example.flip(0) + (0 if name == "shared" else 1),)]}
    return module, cpcompile.select_units(module, batches, squares, {"ffn": 0.5})


@pytest.fixture(scope="module", params=["convolution", "gated", pytest.param("shared", marks=pytest.mark.slow)])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionedModule, Path]:
    module, selection = made(request.param)
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    cpcompile.save_program(module, selection, path)
    return module, path


def test_it_comes_back_as_it_was(saved: tuple[PartitionedModule, Path]) -> None:
    module, path = saved
    program = load_program(path)
    assert program.contexts == ("day", "night")
    assert program.parameter_sizes() == {name: p.numel() for name, p in module.model.named_parameters()}
    (example,) = module.example_inputs
    (name,) = program.inputs
    for index, context in enumerate(program.contexts):
        feeds = {name: example.numpy()}
        with torch.no_grad():
            expected = module(example, context=torch.tensor(index)).numpy()
        (single,) = program.eager(context)(feeds).values()
        (double,) = program.eager(context, double=True)(feeds).values()
        assert np.array_equal(single, expected)
        assert double.dtype == np.float64 and np.abs(double - expected).max() < 1e-5 * np.abs(expected).max()
        assert np.array_equal(program.examples[context][0][name], example.numpy())
        assert sum(program.kept[context].values()) < sum(program.parameter_sizes().values())


def test_the_graph_has_its_own_names_and_axes(saved: tuple[PartitionedModule, Path]) -> None:
    module, path = saved
    program = load_program(path)
    captured = program.capture(opset=23)
    assert {name for name, _ in module.model.named_parameters()} <= set(captured.graph.initializers)
    assert [value.name for value in captured.graph.inputs] == [*program.inputs, "context"]
    assert [value.name for value in captured.graph.outputs] == ["output"]
    shape = captured.graph.inputs[0].shape
    labels = [dim.value for dim in shape if isinstance(dim, ir.SymbolicDim)]
    assert labels == (["batch"] if len(shape) == 4 else ["batch", "sequence"])
    assert str(captured.graph.outputs[0].shape[0]) == "batch"


def test_examples_are_varied_along_the_axes_of_any_length(tmp_path: Path) -> None:
    module, selection = made("gated")
    cpcompile.save_program(module, selection, tmp_path / "model.pt2")
    program = load_program(tmp_path / "model.pt2")
    assert program.lengths["batch"][0] == 1 and program.lengths["sequence"][1] == 64
    shapes = [feeds["x"].shape for feeds in ProgramReference(tmp_path / "model.pt2", program).inputs("day")]
    assert shapes[0] == (2, 6, 16)
    assert {shape[0] for shape in shapes} >= {1, 2, 4} and {shape[1] for shape in shapes} >= {6, 12}


def test_layers_of_one_size_share_their_budget() -> None:
    module, selection = made("convolution")
    counts = {group.name: group.units for group in module.groups}
    assert len(set(counts.values())) == 2
    for layer, units in enumerate(counts.values()):
        assert selection.kept[UnitKind.FFN][:, layer].sum(axis=1).tolist() == [units / 2] * 2
        assert not selection.kept[UnitKind.FFN][:, layer, units:].any()


@pytest.mark.parametrize(
    ("budgets", "batches", "message"),
    [
        ({"expert": 0.5}, ("day", "night"), "no units of kind 'expert'; it has ffn"),
        ({"ffn": 1.5}, ("day", "night"), "ffn = 1.5; it lies above 0 and up to 1"),
        ({"ffn": 0.5}, ("day",), "gates for 2 contexts, the batches are of 1"),
        ({"ffn": 0.5}, ("day", "../x"), "x"),
    ],
)
def test_what_cannot_be_selected(budgets: dict[str, float], batches: tuple[str, ...], message: str) -> None:
    module, _ = made("shared")
    with pytest.raises(UsageError, match=message):
        cpcompile.select_units(module, {context: [module.example_inputs] for context in batches}, squares, budgets)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    module, selection = made("shared")
    (tmp_path / "notes.txt").write_text("mine")
    for path, examples, message in (
        (tmp_path / "notes.txt", None, "not named .pt2"),
        (tmp_path, None, "is a folder"),
        (tmp_path / "a.pt2", {"dusk": []}, "'dusk', which is none of day, night"),
        (tmp_path / "a.pt2", {"day": []}, "examples of 'day' are none"),
    ):
        with pytest.raises(UsageError, match=message):
            cpcompile.save_program(module, selection, path, examples=examples)
    one = Selection(("day",), {kind: table[:1] for kind, table in selection.kept.items()})
    with pytest.raises(UsageError, match="gates for 2 contexts"):
        cpcompile.save_program(module, one, tmp_path / "a.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module, selection = made("gated")
    path = tmp_path_factory.mktemp("good") / "model.pt2"
    cpcompile.save_program(module, selection, path)
    return path


def rewritten(
    good: Path, out: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None
) -> Path:
    """The archive with every member changed (None: left out), and `extra` members."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(out, "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            content = change(name.partition("/")[2], source.read(name))
            if content is not None:
                target.writestr(name, content)
        for name, content in (extra or {}).items():
            target.writestr(f"{root}/{name}", content)
    return out


def edit_json(member: str, edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.startswith(member) or not name.endswith(".json"):
            return content
        plain = json.loads(content)
        edit(plain)
        return json.dumps(plain).encode()

    return change


def _call_a_function(graph: Any) -> None:
    nodes = graph["graph_module"]["graph"]["nodes"]
    nodes[0]["target"] = "os.system"


def _read_a_file(graph: Any) -> None:
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def _import_a_module(graph: Any) -> None:
    signature = graph["graph_module"]["module_call_graph"][0]["signature"]
    context = json.dumps([{"__enum__": True, "fqn": "antigravity:fly", "name": "now"}])
    signature["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])


def _evaluate(text: str) -> Callable[[Any], None]:
    def edit(graph: Any) -> None:
        waiting = [graph]
        while waiting:
            node = waiting.pop()
            if isinstance(node, dict):
                if "expr_str" in node:
                    node["expr_str"] = text
                waiting.extend(node.values())
            elif isinstance(node, list):
                waiting.extend(node)

    return edit


HOSTILE = {
    "a function of Python": (_call_a_function, "refused.*a call of os.system"),
    "a file that is read": (_read_a_file, "refused.*a call of torch.ops.aten.from_file"),
    "an attribute": (_evaluate("().__class__"), "refused.*the expression"),
    "a built-in": (_evaluate("exec('boom')"), "refused.*the expression"),
    "a string": (_evaluate("Symbol('import os')"), "refused.*the expression"),
    "a call in brackets": (_evaluate("(exec)((chr)(49))"), "refused.*the expression"),
    "an import": (_import_a_module, "refused.*the container"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_graphs_that_would_run_code_are_refused(name: str, good: Path, tmp_path: Path) -> None:
    edit, message = HOSTILE[name]
    path = rewritten(good, tmp_path / "bad.pt2", edit_json("models/", edit))
    assert path.read_bytes() != good.read_bytes()
    with pytest.raises(UsageError, match=message):
        load_program(path)


class _Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("boom",)


@pytest.mark.parametrize(
    "member", ["data/weights/weight_0.pt", "data/constants/custom_objs/x", "data/sample_inputs/model.pt"]
)
def test_pickles_with_code_are_refused(
    member: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = io.BytesIO()
    torch.save(_Boom(), packed)
    path = rewritten(
        good,
        tmp_path / "bad.pt2",
        lambda name, content: None if name == member else content,
        {member: packed.getvalue()},
    )
    with pytest.raises(UsageError, match="refused, because loading it would run code"):
        load_program(path)
    assert "boom" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "member",
    ["models/MODEL.JSON", "models/model2.jsox", "data/sample_inputs/model.PT", "data/aotinductor/model/model.so"],
)
def test_members_that_are_read_unseen_are_refused(member: str, good: Path, tmp_path: Path) -> None:
    change = lambda name, content: None if name == member.lower() else content  # noqa: E731
    path = rewritten(good, tmp_path / "bad.pt2", change, {member: b"{}"})
    with pytest.raises(UsageError, match=f"refused.*{member}"):
        load_program(path)


def test_constants_that_are_unpickled_are_refused(good: Path, tmp_path: Path) -> None:
    def edit(payload: Any) -> None:
        next(iter(payload["config"].values()))["path_name"] = "opaque_obj_0"

    path = rewritten(good, tmp_path / "bad.pt2", edit_json("data/constants/model_constants_config", edit))
    with pytest.raises(UsageError, match="refused.*the pickled tensor opaque_obj_0"):
        load_program(path)


def test_guards_are_not_executed(good: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    edit = edit_json("models/", lambda graph: graph.update(guards_code=[f"open({str(ran)!r}, 'w') is not None"]))
    open_source(rewritten(good, tmp_path / "bad.pt2", edit)).capture(opset=23)
    assert not ran.exists()


def test_an_archive_has_every_file_once_and_uncompressed(good: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.pt2"
    twice.write_bytes(good.read_bytes())
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[-1], archive.read(archive.namelist()[-1]))
    bomb = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/models/model.json", bytes(1 << 20))
    for path, message in ((twice, "it has a file twice"), (bomb, "it holds more than it has bytes")):
        with pytest.raises(UsageError, match=f"is damaged.*{message}"):
            load_program(path)


def test_what_is_no_program_of_ours(good: Path, tmp_path: Path) -> None:
    plain = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(plain, tmp_path / "plain.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    os.mkfifo(tmp_path / "pipe.pt2")
    cases = [
        (tmp_path / "nowhere.pt2", "there is no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.pt2", "is not a regular file"),
        (tmp_path / "text.pt2", "is not a torch.export program or is damaged"),
        (tmp_path / "plain.pt2", "has no record of gates; partition the model"),
    ]
    whole = good.read_bytes()
    for number, length in enumerate((0, 100, len(whole) // 2, len(whole) - 30)):
        cut = tmp_path / f"cut{number}.pt2"
        cut.write_bytes(whole[:length])
        cases.append((cut, "is damaged|has no record of gates"))  # a cut can end in an archive within it
    for path, message in cases:
        with pytest.raises(UsageError, match=message):
            load_program(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(version=99),
        lambda record: record.update(contexts=["day", "day"]),
        lambda record: record.update(contexts=["../day", "night"]),
        lambda record: record.update(inputs=[]),
        lambda record: record.update(outputs=["a", "b"]),
        lambda record: record.update(kinds={"down.weight": "wheel"}),
        lambda record: record.update(axes=[1]),
        lambda record: record["kept"]["day"].popitem(),
        lambda record: record["kept"]["day"].update({"down.weight": -1}),
        lambda record: record["kept"].pop("night"),
        lambda record: record["selection"]["ffn"][0]["kept"].pop("night"),
        lambda record: record["selection"]["ffn"][0]["kept"].update(night="1"),
        lambda record: record["selection"]["ffn"][0]["kept"].update(night="<b>"),
        lambda record: record.pop("parameters"),
    ],
)
def test_a_malformed_record_is_refused(edit: Callable[[Any], None], good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path / "bad.pt2", edit_json(f"extra/{RECORD}", edit))
    with pytest.raises(UsageError, match="bad.pt2: "):
        load_program(path)


def test_malformed_examples_are_refused(good: Path, tmp_path: Path) -> None:
    change = lambda name, content: b"!" if name == f"extra/{EXAMPLES}" else content  # noqa: E731
    with pytest.raises(UsageError, match="bad.pt2: "):
        load_program(rewritten(good, tmp_path / "bad.pt2", change))


def test_a_flipped_byte_never_passes_as_another_model(good: Path, tmp_path: Path) -> None:
    whole = bytearray(good.read_bytes())
    reference = load_program(good)
    feeds = reference.examples["day"][0]
    (expected,) = reference.eager("day")(feeds).values()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(len(whole), size=25):
        flipped = whole.copy()
        flipped[position] ^= 0x10
        (tmp_path / "flipped.pt2").write_bytes(flipped)
        try:
            program: Program = load_program(tmp_path / "flipped.pt2")
        except UsageError:
            refused += 1
            continue
        (output,) = program.eager("day")(feeds).values()
        assert np.array_equal(output, expected)
    assert refused > 5


@pytest.mark.parametrize(
    ("example", "given"),
    [
        pytest.param(torch.randn(2, 6, 15), r"torch.float32 \[2, 6, 15\]", marks=pytest.mark.slow),
        (torch.randn(2, 65, 16), r"torch.float32 \[2, 65, 16\]"),
        (torch.randn(2, 6, 16).double(), r"torch.float64 \[2, 6, 16\]"),
        pytest.param(torch.randn(2, 16), r"torch.float32 \[2, 16\]", marks=pytest.mark.slow),
    ],
)
def test_examples_that_the_program_cannot_take_are_refused(example: torch.Tensor, given: str, tmp_path: Path) -> None:
    module, selection = made("gated")
    message = rf"examples: night\[0\]: input 0 is {given}, and the program takes torch.float32 \["
    with pytest.raises(UsageError, match=message):
        cpcompile.save_program(module, selection, tmp_path / "model.pt2", examples={"night": [(example,)]})
    assert not list(tmp_path.iterdir())
