import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cpcompile.core.config import preset
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.frontend.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cpcompile.models.decoder import Decoder


class Harmful:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/cpcompile-test-was-run",)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    config = preset("nano")
    model = Decoder(config, contexts=2)
    generator = np.random.default_rng(0)
    selection = Selection(
        ("a", "b"),
        {
            UnitKind.FFN: generator.random((2, config.layers, config.ffn // config.align)) < 0.5,
            UnitKind.HEAD: np.ones((2, config.layers, config.kv_heads), np.bool_),
        },
    )
    model.select(selection)
    return Checkpoint(
        config=config,
        state=model.state_dict(),
        contexts=("a", "b"),
        tokenizer="{}",
        selection=selection,
        training={"seed": 3, "list": [1, 2.5, None, "x"]},
        held_out={"a": np.arange(5, dtype=np.int32)},
    )


@pytest.fixture
def path(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_round_trip(checkpoint: Checkpoint, path: Path) -> None:
    again = load_checkpoint(path)
    assert again.config == checkpoint.config
    assert again.contexts == checkpoint.contexts
    assert again.training == checkpoint.training
    assert again.selection is not None
    assert checkpoint.selection is not None
    assert again.selection.to_plain() == checkpoint.selection.to_plain()
    assert again.held_out["a"].tolist() == [0, 1, 2, 3, 4]
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(again.model(ids, torch.tensor(1)), checkpoint.model(ids, torch.tensor(1)))


def test_the_file_loads_without_code(path: Path) -> None:
    assert torch.load(path, weights_only=True)["format"] == "cpcompile-checkpoint"


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = Path("/tmp/cpcompile-test-was-run")
    ran.unlink(missing_ok=True)
    for name, write in {
        "zip.pt": lambda p: torch.save({"format": "cpcompile-checkpoint", "x": Harmful()}, p),
        "plain.pt": lambda p: p.write_bytes(pickle.dumps(Harmful())),
    }.items():
        write(tmp_path / name)
        with pytest.raises(UsageError, match=f"{name}: refused.*plain tensors only") as caught:
            load_checkpoint(tmp_path / name)
        assert caught.value.exit_code == 2
        assert not ran.exists()


def test_a_truncated_file_is_named_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for part in (0.0, 0.001, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(UsageError, match="model.pt: is truncated" if part else "model.pt: is empty"):
            load_checkpoint(path)


def test_a_damaged_file_and_other_files_are_told_from_code(path: Path) -> None:
    whole = path.read_bytes()
    for other, message in {
        whole[:100] + bytes(100) + whole[200:]: "is damaged",
        b"PK\x03\x04" + whole[4:-2]: "is truncated",
        b"some text": "is not a torch file",
        bytes(1000): "is not a torch file",
    }.items():
        path.write_bytes(other)
        with pytest.raises(UsageError, match=f"model.pt: {message}"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"layer.weight": torch.ones(2)}, "not a cpcompile checkpoint"),
        ([1, 2], "not a cpcompile checkpoint"),
        ({"format": "cpcompile-checkpoint", "version": 99}, "version 99"),
        ({"format": "cpcompile-checkpoint", "version": 1}, "incomplete or inconsistent"),
    ],
)
def test_other_torch_files_are_named(tmp_path: Path, plain: object, message: str) -> None:
    torch.save(plain, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=f"x.pt: .*{message}"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_state_that_does_not_fit_its_config_is_refused(path: Path) -> None:
    plain = torch.load(path, weights_only=True)
    plain["state"]["norm.weight"] = torch.ones(3)
    torch.save(plain, path)
    with pytest.raises(UsageError, match="norm.weight"):
        load_checkpoint(path)


def test_the_model_is_around_the_tensors_of_the_state(path: Path) -> None:
    checkpoint = load_checkpoint(path)
    parameters = dict(checkpoint.model.named_parameters())
    assert parameters.keys() == checkpoint.state.keys()
    assert all(parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in checkpoint.state.items())
    assert not any(buffer.is_meta for buffer in checkpoint.model.buffers())
    assert not Decoder(checkpoint.config).norm.weight.is_meta  # models made later have weights again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"norm.weight": state["norm.weight"].half()}), "norm.weight is torch.float16"),
        (lambda state: state.update({"norm.weight": state["norm.weight"].to("meta")}), "norm.weight is .* on meta"),
        (lambda state: state.update({"norm.weight": 5}), "incomplete or inconsistent"),
        (lambda state: state.update({"another.weight": torch.ones(1)}), "Unexpected key.*another.weight"),
        (lambda state: state.pop("norm.weight"), "Missing key.*norm.weight"),
    ],
)
def test_a_malformed_state_is_refused(path: Path, change: Callable[[dict[str, object]], object], message: str) -> None:
    plain = torch.load(path, weights_only=True)
    change(plain["state"])
    torch.save(plain, path)
    with pytest.raises(UsageError, match=f"(?s)model.pt: .*{message}"):
        load_checkpoint(path)


CHANGES: dict[str, tuple[str, object, str]] = {
    "path as a context": ("contexts", ["../../evil", "b"], "cannot name a context"),
    "reserved context": ("contexts", ["router", "b"], "cannot name a context"),
    "context twice": ("contexts", ["a", "a"], "not distinct"),
    "no context": ("contexts", [], "none or not distinct"),
    "number as context": ("contexts", [1, 2], "cannot name a context"),
    "other contexts": ("contexts", ["a", "c"], "the selection is for"),
    "a unit too many": (
        "selection",
        {"contexts": ["a", "b"], "kept": {"ffn": np.ones((2, 2, 17), int).tolist()}},
        "the selection",
    ),
    "training is no table": ("training", [], "incomplete or inconsistent"),
    "settings of another form": ("training", {"settings": {"sequence": "x"}}, "training.settings.sequence"),
    "tokenizer is no text": ("tokenizer", 5, "tokenizer is no text"),
    "floats as tokens": ("held_out", {"a": torch.ones(3)}, "no list of token ids"),
    "tokens of nobody": ("held_out", {"z": torch.ones(3, dtype=torch.int32)}, "no list of token ids"),
    "tokens beyond": ("held_out", {"a": torch.tensor([1, 512], dtype=torch.int32)}, "outside of the vocabulary"),
    "tokens below": ("held_out", {"a": torch.tensor([-1], dtype=torch.int32)}, "outside of the vocabulary"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_malformed_field_is_refused(path: Path, change: str) -> None:
    key, value, message = CHANGES[change]
    plain = torch.load(path, weights_only=True)
    plain[key] = value
    torch.save(plain, path)
    with pytest.raises(UsageError, match=f"model.pt: .*{message}"):
        load_checkpoint(path)


@pytest.mark.parametrize(("key", "value"), [("norm_eps", float("nan")), ("width", 64.5), ("layers", 10**9)])
def test_a_malformed_architecture_is_refused(path: Path, key: str, value: object) -> None:
    plain = torch.load(path, weights_only=True)
    plain["architecture"]["config"][key] = value
    torch.save(plain, path)
    with pytest.raises(UsageError, match="model.pt: "):
        load_checkpoint(path)


def test_no_file_a_folder_and_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    os.mkfifo(tmp_path / "pipe.pt")
    cases = {
        "nowhere.pt": "no such file",
        ".": "is a folder",
        "text.pt": "not a torch file",
        "pipe.pt": "not a regular",
    }
    for name, message in cases.items():
        with pytest.raises(UsageError, match=message):
            load_checkpoint(tmp_path / name)


def test_writing_fails_with_a_sentence_and_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(CpcompileError, match=r"model.pt: is a folder"):
        save_checkpoint(checkpoint, tmp_path / "model.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
