"""A few classes of transformers, always the same ones; and all of them that can be built tiny, one per family."""

from __future__ import annotations

import re

import pytest

from tests.fuzz.fuzz_hugging_face import Outcome, classes, outcomes

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")

SAMPLE = {
    "XLNetLMHeadModel": "refused",
    "ResNetForImageClassification": "partitioned",
    "BertLMHeadModel": "refused",  # not causal unless it is a decoder
}


def findings(found: list[Outcome]) -> list[str]:
    return [f"{each.name}: {each.text}" for each in found if each.result == "finding"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n[0] == "X" else n for n in SAMPLE])
def test_a_folder_is_partitioned_or_refused_with_a_sentence(name: str) -> None:
    (found,) = outcomes([name])
    assert found.result == SAMPLE[name], found


@pytest.mark.slow
def test_every_family() -> None:
    families = {
        re.sub(r"(For[A-Z].*|(With)?LMHeadModel|(Text)?Model)$", "", name): name for name in reversed(classes())
    }
    found = list(outcomes(list(families.values()), seconds=3000))
    assert findings(found) == []
    assert sum(each.result in ("partitioned", "refused") for each in found) >= 50
    assert sum(each.result == "partitioned" for each in found) >= 15
