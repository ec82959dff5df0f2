import numpy as np
import pytest

from cpcompile.core.selection import Selection, UnitKind


def make() -> Selection:
    table = np.array([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 0, 1, 0], [1, 0, 0, 1]]], dtype=np.bool_)
    return Selection(("a", "b"), {UnitKind.FFN: table})


def test_plain_form_round_trips() -> None:
    selection = make()
    again = Selection.from_plain(selection.to_plain())
    assert again.contexts == selection.contexts
    assert np.array_equal(again.kept[UnitKind.FFN], selection.kept[UnitKind.FFN])


def test_digits_are_those_of_units_that_exist() -> None:
    digits = make().digits({UnitKind.FFN: [("first", 4), ("second", 3)], UnitKind.HEAD: [("first", 2)]})
    assert digits == {
        "ffn": [
            {"name": "first", "kept": {"a": "1100", "b": "1010"}},
            {"name": "second", "kept": {"a": "100", "b": "100"}},
        ]
    }


@pytest.mark.parametrize("table", [np.ones((3, 1, 1), np.bool_), np.ones((2, 4), np.bool_), np.ones((2, 1, 1))])
def test_a_table_of_the_wrong_form_is_refused(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="boolean array of shape"):
        Selection(("a", "b"), {UnitKind.FFN: table})
