from pathlib import Path

import pytest

from cpcompile.cli.settings import load_toml
from cpcompile.core.check_config import CheckConfig
from cpcompile.core.config import ModelConfig, TrainConfig, ValidateConfig, preset
from cpcompile.core.errors import UsageError
from cpcompile.core.overrides import override


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": float("inf")}, "learning_rate is inf: a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: a finite number"),
        ({"steps": True}, "steps is True: int is needed"),
        ({"steps": 1.5}, "steps is 1.5: int is needed"),
        ({"budgets": 0.5}, "budgets is 0.5: a table is needed"),
        ({"budgets": {"ffn": "half"}}, "budgets.ffn is 'half': float is needed"),
        ({"budgets": {"ffn": 0.0}}, "ffn = 0.0; a budget is above 0"),
        ({"budgets": {"layer": 0.5}}, "'layer' is none of the kinds ffn, head, expert"),
        ({"core_fractions": {"head": float("nan")}}, "core_fractions.head is nan"),
        ({"controls": "one-mask"}, "controls is 'one-mask': a list is needed"),
        ({"controls": [1]}, "controls[0] is 1: str is needed"),
        ({"controls": ["no-mask"]}, "'no-mask' is none of one-mask"),
        ({"steps": -1}, "steps is -1: it cannot be negative"),
        ({"stepz": 5}, "there is no setting 'stepz'"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        override(TrainConfig(), values, where="train")
    assert says in str(caught.value)


def test_a_table_replaces_the_entries_that_it_has() -> None:
    config = override(TrainConfig(), {"budgets": {"ffn": 1}}, where="train")
    assert config.budgets == {"ffn": 1.0, "head": 0.5}


def test_none_leaves_a_setting_alone() -> None:
    assert override(TrainConfig(), {"steps": None}, where="train") == TrainConfig()


def test_a_model_needs_a_positive_epsilon() -> None:
    with pytest.raises(UsageError, match="norm_eps"):
        ModelConfig(norm_eps=0.0)


def test_presets_have_names() -> None:
    assert preset("nano").layers == 2
    with pytest.raises(UsageError, match="'huge' does not exist; there are nano, tiny, small"):
        preset("huge")


@pytest.mark.parametrize(
    ("content", "says"), [("steps = 5", "outside of a table"), ("[train", "not valid TOML"), (None, "cannot be read")]
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        load_toml(path)
    assert str(path) in str(caught.value)


def test_a_demanded_speed_must_be_measured() -> None:
    with pytest.raises(UsageError, match="speed is not measured: leave one of them out"):
        ValidateConfig(speed=False, min_speed_ratio=2.0)


def test_a_limit_that_nothing_can_miss_is_refused() -> None:
    with pytest.raises(UsageError, match=r"check.speed_ratio.max_decrease is 5.0, .*0.05 is 5 %"):
        override(CheckConfig(), {"speed_ratio": {"max_decrease": 5.0}}, where="check")
