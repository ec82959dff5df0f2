"""What options take: every option of every command, with values that it cannot have, ends in a sentence."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cpcompile.cli import main
from cpcompile.cli.options import validate_config
from cpcompile.core.config import PEERS, ValidateConfig
from cpcompile.core.errors import UsageError

NONE = {"peers": None, "no_speed": False, "no_memory": False, "no_layers": False}
WRONG = ("", "-1", "nan", "1e999", "\N{SNOWMAN}", "a" * 5000)
OPTIONS = [
    (name, option.opts[0])
    for name, command in main.commands.items()
    if name not in ("demo", "doctor", "passes")  # which have nothing to go wrong, or would run
    for option in command.params
    if isinstance(option, click.Option) and not option.is_flag
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_a_value_that_an_option_cannot_have_is_a_sentence(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    required = [p.opts[0] for p in main.commands[name].params if p.required and isinstance(p, click.Option)]
    for wrong in WRONG:
        arguments = ["missing.onnx" for p in main.commands[name].params if isinstance(p, click.Argument) and p.required]
        for flag in required:
            arguments += [flag, "corpus"] if flag != option else []
        result = CliRunner().invoke(main, [name, *arguments, option, wrong])
        assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), (wrong, result.exception)
        assert "Error: " in result.output, (wrong, result.output)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_options_override_the_table_and_the_table_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        "[validate]\nrounds = 7\nmax_perplexity_increase = 1\nshapes = [[1, 8], [2, 4]]\npeers = ['openvino']\n"
        "tolerance_multiple = 4.5\nthreads = 1\ncoherence = false\n"
    )
    found = validate_config(path, **NONE, rounds=None, max_perplexity_increase=0.05, min_speed_ratio=None)
    assert found == ValidateConfig(
        rounds=7,
        max_perplexity_increase=0.05,
        shapes=((1, 8), (2, 4)),
        peers=("openvino",),
        tolerance_multiple=4.5,
        threads=1,
        coherence=False,
    )
    assert validate_config(None, **NONE) == ValidateConfig()
    off = validate_config(None, peers=None, no_speed=True, no_memory=True, no_layers=True)
    assert off == ValidateConfig(speed=False, memory=False, layers=False)


@pytest.mark.parametrize(
    ("peers", "chosen"), [("all", PEERS), ("none", ()), ("openvino,onnx-dense,openvino", ("openvino", "onnx-dense"))]
)
def test_peers_are_named_or_all_or_none(peers: str, chosen: tuple[str, ...]) -> None:
    assert validate_config(None, **NONE | {"peers": peers}).peers == chosen


@pytest.mark.parametrize("name", ["build", "validate"])
def test_every_field_of_the_validation_can_be_set(name: str, tmp_path: Path) -> None:
    """By the table, from a file that the commands read."""
    for field, value in vars(ValidateConfig()).items():
        path = tmp_path / f"{field}.toml"
        text = (
            str([list(each) if isinstance(each, tuple) else each for each in value])
            if isinstance(value, tuple)
            else value
        )
        path.write_text(f"[validate]\n{field} = {str(text).lower()}\n")
        assert validate_config(path, **NONE) == ValidateConfig(), field
        path.write_text(f"[validate]\n{field} = {{}}\n")
        result = CliRunner().invoke(main, [name, "missing.pt", "--config", str(path)])
        assert result.exit_code == 2 and f"{path}: validate.{field} is {{}}" in result.output, result.output


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rounds": "60"}, "validate.rounds is '60': int is needed"),
        ({"shapes": ()}, "validate.shapes is (): pairs of batch and sequence are needed"),
        ({"shapes": ((0, 1),)}, "validate.shapes is ((0, 1),): pairs"),
        ({"speed_shapes": [[1, 2, 3]]}, "validate.speed_shapes[0] is [1, 2, 3]: a list of 2 is needed"),
        ({"tolerance_multiple": 0}, "validate.tolerance_multiple is 0.0: it has to be positive"),
        ({"max_perplexity_increase": -0.1}, "validate.max_perplexity_increase is -0.1: it cannot be negative"),
        ({"memory": 1}, "validate.memory is 1: bool is needed"),
        ({"peers": "all"}, "validate.peers is 'all': a list is needed"),
        ({"peers": ("all", "openvino")}, "there is no peer 'all'"),
        ({"min_speed_ratio": float("inf")}, "validate.min_speed_ratio is inf: a finite number is needed"),
    ],
)
def test_a_wrong_value_is_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        ValidateConfig(**settings)  # type: ignore[arg-type]
    assert says in str(caught.value)
