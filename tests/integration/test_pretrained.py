"""`cpcompile train --from-pretrained` and `build` on a tiny Llama and GPT-2 with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, processors

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.selection import UnitKind
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.partitioning.hugging_face import prepare_hugging_face
from cpcompile.partitioning.partitioned_module import PartitionedModule
from cpcompile.partitioning.partitioner import partition
from cpcompile.runtime.engine import load_engine
from cpcompile.text.corpus import Corpus
from cpcompile.text.tokenization import parse_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=520,  # more rows than tokens
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            tie_word_embeddings=True,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    ),
}
SHORT = ["--sequence", 32, "--batch", 2]
QUICK = ["--no-speed", "--no-memory", "--no-layers"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Hugging Face's `save_pretrained` writes it."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, corpus_folder: Path, cache: Path) -> Path:
    """Trained for a few steps, after least squares."""
    out = folder / "model.pt"
    train = ["train", "--data", corpus_folder, "--cache", cache, "--from-pretrained", folder, "-o", out]
    result = run(*train, *SHORT, "--steps", 4, "--recover", "least-squares", "--controls", "one-mask")
    assert result.exit_code == 0, result.output
    return out


def test_it_is_partitioned_by_its_own_names(model: Path) -> None:
    checkpoint, dense = load_checkpoint(model), load_checkpoint(model.with_name("model.dense.pt"))
    assert checkpoint.selection is not None
    assert set(checkpoint.selection.kept[UnitKind.FFN].mean(axis=(1, 2))) == {0.5}
    assert set(checkpoint.selection.kept[UnitKind.HEAD].mean(axis=(1, 2))) == {0.75}
    channels = 64 if "llama" in str(model) else 128
    assert checkpoint.selection.kept[UnitKind.FFN].shape == (3, 2, channels)  # single channels, not blocks of them
    own = transformers.AutoModelForCausalLM.from_pretrained(model.parent, local_files_only=True)
    assert set(dense.state) == {name for name, _ in own.named_parameters()}
    tables = {name: value for name, value in checkpoint.state.items() if name.endswith(".table")}
    assert set(checkpoint.state) - set(tables) == set(dense.state)
    for kind in checkpoint.selection.kept:
        for layer, gate in enumerate(checkpoint.model.gates(kind)):
            assert np.array_equal(gate.table.detach().numpy() != 0, checkpoint.selection.kept[kind][:, layer])
    assert set(checkpoint.training["controls"]) == {"one-mask"}
    for loaded in (checkpoint, dense):
        parameters = dict(loaded.model.named_parameters())
        assert parameters.keys() == loaded.state.keys()
        assert all(parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in loaded.state.items())
        assert not any(buffer.is_meta for buffer in loaded.model.buffers())


@pytest.mark.slow
def test_a_trace_of_one_size_finds_what_a_trace_of_all_sizes_finds(model: Path) -> None:
    own = transformers.AutoModelForCausalLM.from_pretrained(model.parent, local_files_only=True)
    ready = prepare_hugging_face(own)
    every = partition(own, ready.example_inputs, forward=ready.forward, dynamic_shapes=ready.dynamic_shapes, align=1)
    one = load_checkpoint(model).model.partitioned

    def plain(module: PartitionedModule) -> list[object]:
        return [
            (
                g.name,
                g.kind,
                g.units,
                {n: [a is not None and a.tolist() for a in axes] for n, axes in g.parameters.items()},
            )
            for g in module.groups
        ]

    assert plain(one) == plain(every)
    assert one.refused == every.refused


def test_a_run_without_steps_is_the_model_as_it_came(
    folder: Path, corpus_folder: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.pt"
    train = ["train", "--data", corpus_folder, "--cache", cache, "--from-pretrained", folder, "-o", out, *SHORT]
    result = run(*train, "--steps", 0)
    assert result.exit_code == 0, result.output
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    checkpoint, dense = load_checkpoint(out), load_checkpoint(tmp_path / "model.dense.pt")
    ids = torch.arange(34).reshape(2, 17)
    with torch.no_grad():
        assert torch.allclose(dense.model(ids), own(ids).logits, atol=1e-6)
        # Units were reordered for storage: with all gates at 1 the function is still the same.
        whole = {n: torch.ones_like(v) if n.endswith(".table") else v for n, v in checkpoint.state.items()}
        checkpoint.model.load_state_dict(whole)
        assert torch.allclose(checkpoint.model(ids, torch.tensor(1)), own(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_it_is_built_like_our_own(model: Path, tmp_path: Path) -> None:
    result = run("build", model, "-o", tmp_path / "m.cpc", *QUICK, "--contexts", "cpp,python", "--json")
    assert result.exit_code in (0, 1), result.output
    report = json.loads(result.stdout)
    (built,) = tmp_path.iterdir()
    checkpoint = load_checkpoint(model)
    ids = np.arange(34, dtype=np.int64).reshape(2, 17) * 11 % 500
    for context in report["contexts"]:
        assert context["variants"][0]["parity"]["verdict"] == "pass"
        assert set(context["parameters"]["removed_by_kind"]) == {"ffn", "head"}
        index = checkpoint.contexts.index(context["name"])
        with torch.no_grad():
            expected = checkpoint.model(torch.from_numpy(ids), torch.tensor(index)).numpy()
        assert np.abs(load_engine(open_bundle(built), context["name"]).run(ids) - expected).max() <= 1e-4
    assert report["model"]["architecture"] == "hugging_face"


@pytest.mark.slow
def test_its_vocabulary_can_be_trimmed(model: Path, tmp_path: Path) -> None:
    flags = ("--vocabulary-coverage", 0.9, "--contexts", "english", *QUICK, "--json")
    result = run("build", model, "-o", tmp_path / "m.cpc", *flags)
    assert result.exit_code in (0, 1), result.output
    (context,) = json.loads(result.stdout)["contexts"]
    assert context["variants"][0]["parity"]["verdict"] == "pass"
    assert context["parameters"]["removed_by_kind"]["vocabulary"] > 0


@pytest.mark.slow
def test_every_window_starts_with_the_tokens_that_the_tokenizer_puts_in_front(
    corpus: Corpus, corpus_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """From importance to the engine's quality, with a trimmed vocabulary as well."""
    folder, model, bundle = tmp_path / "llama", tmp_path / "model.pt", tmp_path / "model.cpc"
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(folder)
    tokenizer = parse_tokenizer(corpus.tokenizer)
    tokenizer.add_special_tokens(["<s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    seen: set[int] = set()

    def embedded(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and inputs[0].shape[-1] == 32:
            seen.update(inputs[0][:, 0].tolist())

    with torch.nn.modules.module.register_module_forward_pre_hook(embedded):
        train = ["train", "--data", corpus_folder, "--cache", cache, "--from-pretrained", folder, "-o", model]
        result = run(*train, *SHORT, "--steps", 4, "--recover", "least-squares", "--controls", "one-mask")
        assert result.exit_code == 0, result.output
        assert seen == {bos}
    flags = ("--vocabulary-coverage", 0.9, "--contexts", "english", *QUICK, "--json")
    result = run("build", model, "-o", bundle, *flags)
    assert result.exit_code in (0, 1), result.output
    (context,) = json.loads(result.stdout)["contexts"]
    (built,) = (path for path in tmp_path.iterdir() if path.name.startswith("model.cpc"))
    trimmed = Tokenizer.from_file(str(open_bundle(built).tokenizer("english")))
    assert trimmed.encode("a").tokens[0] == "<s>"
    assert context["variants"][0]["quality"]["perplexity"] == pytest.approx(
        load_checkpoint(model).training["perplexity"]["partition"]["english"], rel=0.2
    )


def test_what_is_no_model_is_refused(corpus_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").touch()
    train = ["train", "--data", corpus_folder, "-o", tmp_path / "m.pt", "--from-pretrained"]
    for arguments, message in {
        (*train, tmp_path / "nowhere"): "there is no such folder; models are read from disk",
        (*train, tmp_path / "empty"): "cannot be read as a Hugging Face model",
        (*train, tmp_path / "two"): "has 2 GGUF files",
        (*train, tmp_path / "empty", "--preset", "nano"): "sets shape and tokenizer",
        (*train[:-1], "--recover", "least-squares", "--steps", 4, "--preset", "nano"): "are for pretrained models",
    }.items():
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.output.split()), (arguments, result.output)


@pytest.mark.slow
def test_experts_are_removed_and_named(corpus: Corpus, corpus_folder: Path, cache: Path, tmp_path: Path) -> None:
    """A tiny Mixtral: two of eight experts stay for each context, as many as a token has."""
    folder = tmp_path / "mixtral"
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
    (tmp_path / "settings.toml").write_text("[train]\nbudgets = { expert = 0.25 }\nimportance_sequences = 4\n")
    model, bundle = tmp_path / "model.pt", tmp_path / "model.cpc"
    train = ["train", "--data", corpus_folder, "--cache", cache, "--from-pretrained", folder, "-o", model, *SHORT]
    result = run(*train, "--steps", 0, "--config", tmp_path / "settings.toml")
    assert result.exit_code == 0, result.output
    result = run("build", model, "-o", bundle, "--contexts", "cpp,python", *QUICK, "--json")
    assert result.exit_code in (0, 1), result.output
    selection = load_checkpoint(model).selection
    assert selection is not None
    for context in json.loads(result.stdout)["contexts"]:
        assert context["variants"][0]["parity"]["verdict"] == "pass"
        parameters = context["parameters"]
        assert parameters["removed_by_kind"]["expert"] == 2 * 6 * (3 * 24 * 32 + 32)
        kept = selection.row(context["name"])[UnitKind.EXPERT]
        gone = {f"model.layers.{n}.mlp.gate.weight": np.flatnonzero(~kept[n]).tolist() for n in range(2)}
        assert parameters["removed_experts"] == gone
