"""Facts of files as training and `save_program` write them, and of files that somebody changed."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

import cpcompile
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection
from cpcompile.frontend.checkpoint import Checkpoint, load_checkpoint, make_model, save_checkpoint
from cpcompile.frontend.program import load_program
from cpcompile.machine.memory import peak_resident_bytes
from cpcompile.pipeline.estimation import Facts, measure_libraries, read_facts
from tests.unit.partitioning.models import GatedConvolution, randomise


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = GatedConvolution()
    randomise(net, 1)
    generator = torch.Generator().manual_seed(0)
    batches = {name: [(torch.randn(2, 6, 16, generator=generator),)] for name in ("day", "night")}
    shapes = ({0: Dim("batch", min=1), 1: Dim("sequence", max=64)},)
    module = cpcompile.partition(net, batches["day"][0], contexts=2, dynamic_shapes=shapes, align=4)
    selection = cpcompile.select_units(module, batches, lambda output, _: output.square().sum(), {"ffn": 0.5})
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    cpcompile.save_program(module, selection, path, examples=batches)
    return path


def test_a_decoder_of_our_own(trained: Path) -> None:
    facts, checkpoint = read_facts(trained), load_checkpoint(trained)
    assert checkpoint.selection is not None
    assert facts.model_type is None and facts.result_elements is None
    assert facts.bytes == 4 * sum(tensor.numel() for tensor in checkpoint.state.values())
    assert facts.parameters == facts.bytes // 4
    dense = load_checkpoint(trained.with_name("model.dense.pt"))
    assert facts.dense_bytes == 4 * sum(tensor.numel() for tensor in dense.state.values())
    assert (facts.classes, facts.sequence, facts.vocabulary_bytes) == (512, 32, 4 * 512 * 64)
    assert set(facts.contexts) == {"cpp", "english", "python"}
    sizes = [context.kept_bytes for context in facts.contexts.values()]
    assert max(sizes) < facts.union_bytes < min(sum(sizes), facts.bytes)
    for context in facts.contexts.values():
        assert (context.head_bytes, context.classes) == (4 * 512 * 64, 512)  # tied


def test_fewer_contexts_and_tokens(trained: Path) -> None:
    whole, one = read_facts(trained), read_facts(trained, contexts=["cpp"])
    assert set(one.contexts) == {"cpp"} and one.contexts["cpp"] == whole.contexts["cpp"]
    assert one.union_bytes == one.contexts["cpp"].kept_bytes
    cut = read_facts(trained, coverage=0.5)
    for name, context in cut.contexts.items():
        lost = 512 - context.classes
        assert 0 < lost < 512 and context.head_bytes == 4 * 64 * context.classes
        assert whole.contexts[name].kept_bytes - context.kept_bytes == 4 * 64 * lost
    assert whole.union_bytes > cut.union_bytes >= max(context.kept_bytes for context in cut.contexts.values())


def llama(transformers: Any) -> Any:
    shape = {"vocab_size": 520, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))


def gpt2(transformers: Any) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def pretrained(make: Callable[[Any], Any], folder: Path) -> Path:
    """A checkpoint of a tiny model of others in which half of everything is kept, at random."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")
    from cpcompile.core.config import PretrainedConfig

    torch.manual_seed(0)
    net = make(transformers)
    config = PretrainedConfig(settings=json.loads(net.config.to_json_string(use_diff=False)))
    model = make_model(config, contexts=2)
    generator = np.random.default_rng(0)
    kept = {u.kind: np.stack([_half((u.layers, u.count), generator) for _ in "ab"]) for u in model.units()}
    state, tokenizer = model.state_dict(), "{}"
    checkpoint = Checkpoint(
        config=config, state=state, contexts=("a", "b"), tokenizer=tokenizer, selection=Selection(("a", "b"), kept)
    )
    save_checkpoint(checkpoint, folder / "model.pt")
    return folder / "model.pt"


def _half(shape: tuple[int, int], generator: np.random.Generator) -> Any:
    return np.stack([generator.permutation(shape[1]) < shape[1] // 2 for _ in range(shape[0])])


@pytest.mark.parametrize(("make", "off"), [(llama, 0.01), (gpt2, 0.05)])
def test_a_pretrained_model_nearly(make: Callable[[Any], Any], off: float, tmp_path: Path) -> None:
    path = pretrained(make, tmp_path)
    facts, checkpoint = read_facts(path), load_checkpoint(path)
    assert checkpoint.selection is not None
    assert facts.model_type == make.__name__ and facts.dense_bytes is None
    for name, context in facts.contexts.items():
        exact = 4 * sum(checkpoint.model.kept_sizes(checkpoint.selection, name).values())
        assert exact < 0.9 * facts.bytes
        assert context.kept_bytes == pytest.approx(exact, rel=off)
        assert context.head_bytes == facts.vocabulary_bytes == 4 * facts.classes * (48 if make is llama else 32)


def test_a_vocabulary_that_no_parameter_has(tmp_path: Path) -> None:
    path = pretrained(llama, tmp_path)
    plain = torch.load(path, weights_only=True)
    plain["architecture"]["config"]["settings"]["vocab_size"] = 10**12
    torch.save(plain, path)
    with pytest.raises(UsageError, match=r"model.pt: .*no parameter has a row for each of 1000000000000 tokens"):
        read_facts(path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("vocabulary", 10**9, "inconsistent"),
        ("layers", 10**9, "layers and"),
        ("width", 10**9, "inconsistent"),
        ("vocabulary", 10**12, "model.vocabulary: is beyond"),
        ("align", 1.5, "model.align is 1.5: int is needed"),
    ],
)
def test_a_decoder_that_claims_to_be_larger(trained: Path, tmp_path: Path, key: str, value: int, says: str) -> None:
    plain = torch.load(trained, weights_only=True)
    plain["architecture"]["config"][key] = value
    torch.save(plain, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=f"model.pt: .*{says}"):
        read_facts(tmp_path / "model.pt")


def test_a_program(program: Path) -> None:
    facts, loaded = read_facts(program), load_program(program)
    for name, context in facts.contexts.items():
        assert context.kept_bytes == 4 * sum(loaded.kept[name].values())
        assert (context.head_bytes, context.classes) == (0, 0)
    tensors = loaded.exported.state_dict
    assert facts.bytes == 4 * sum(tensor.numel() for tensor in tensors.values())
    assert facts.result_elements == 2 * 6 * 48  # queries, keys and values of the example; every parameter is larger
    assert max(context.kept_bytes for context in facts.contexts.values()) <= facts.union_bytes <= facts.bytes
    assert set(read_facts(program, contexts=["night"]).contexts) == {"night"}


def rewritten(program: Path, target: Path, change: Callable[[str, Any], None]) -> Path:
    """`program` with its JSON changed and its checksums right."""
    packed = io.BytesIO()
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".json"):
                plain = json.loads(content)
                change(entry.filename.rpartition("/")[2], plain)
                content = json.dumps(plain).encode()
            new.writestr(entry.filename, content)
    target.write_bytes(packed.getvalue())
    return target


def _axis(length: Any) -> Callable[[str, Any], None]:
    def change(name: str, plain: Any) -> None:
        if name == "model.json":
            plain["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"][2] = {"as_int": length}

    return change


def _record(key: str, value: Any) -> Callable[[str, Any], None]:
    def change(name: str, plain: Any) -> None:
        if name == "cpcompile.json":
            plain[key] = value

    return change


CHANGES = {
    "a result of 10^400 elements": (_axis(10**400), "larger than any tensor can be"),
    "an axis of less than nothing": (_axis(-4), "has an axis of -4"),
    "an axis of text": (_axis("9" * 99), "has an axis of 9{40}"),
    "more is kept than there is": (_record("kept", {"day": {"x": 10**30}, "night": {}}), "contexts keep"),
    "less than nothing is kept": (_record("kept", {"day": {}, "night": {"x": -1}}), "contexts keep"),
    "kept is a list": (_record("kept", []), "indices"),
    "no contexts": (_record("contexts", []), "there are no contexts"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_program_that_somebody_changed(program: Path, tmp_path: Path, name: str) -> None:
    change, says = CHANGES[name]
    path = rewritten(program, tmp_path / "net.pt2", change)
    with pytest.raises(UsageError, match=f"net.pt2: is incomplete or inconsistent .*{says}.*; save it again"):
        read_facts(path)


def test_a_size_that_depends_on_data_is_no_reason_to_refuse(program: Path, tmp_path: Path) -> None:
    def change(name: str, plain: Any) -> None:
        if name == "model.json":
            for value in plain["graph_module"]["graph"]["tensor_values"].values():
                for size in value["sizes"]:
                    if "as_expr" in size:
                        size["as_expr"]["hint"] = None

    facts = read_facts(rewritten(program, tmp_path / "net.pt2", change))
    assert facts.result_elements == 48  # both symbols count as 1


def test_what_a_program_cannot(program: Path) -> None:
    with pytest.raises(UsageError, match="brings no tokenizer; leave --vocabulary-coverage out"):
        read_facts(program, coverage=1.0)
    with pytest.raises(UsageError, match="has no context 'noon'; it has day, night"):
        read_facts(program, contexts=["noon"])


@pytest.mark.parametrize("suffix", ["pt", "pt2"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "folder", "missing"])
def test_files_that_are_none(trained: Path, program: Path, tmp_path: Path, suffix: str, damage: str) -> None:
    path, source = tmp_path / f"model.{suffix}", trained if suffix == "pt" else program
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": source.read_bytes()[:-2000], "empty": b"", "text": b"no model"}[damage])
    with pytest.raises(UsageError, match=rf"model.{suffix}: ") as refused:
        read_facts(path)
    assert "\n" not in str(refused.value) and "mmap" not in str(refused.value)


def test_a_dense_model_has_nothing_to_build(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained.with_name("model.dense.pt"), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="is a dense checkpoint"):
        read_facts(tmp_path / "model.pt")


@pytest.mark.slow
def test_the_libraries_are_measured() -> None:
    libraries = measure_libraries(None)
    # An engine is ONNX Runtime alone; torch weighs more, and exporting with it more still.
    assert 20e6 < libraries.engine < libraries.eager < libraries.build
    # The kernel counts pages in batches, so of two peaks the later can be read as a little less.
    assert libraries.validation == pytest.approx(peak_resident_bytes(), rel=0.01)
    assert libraries.build < 1.01 * libraries.validation
    with pytest.raises(UsageError, match="has no causal 'vit'"):
        measure_libraries("vit")


def test_facts_are_all_plain_numbers(trained: Path) -> None:
    facts: Facts = read_facts(trained)
    assert all(type(v) is int for v in (facts.bytes, facts.union_bytes, facts.sequence, facts.tokenizer_bytes))
