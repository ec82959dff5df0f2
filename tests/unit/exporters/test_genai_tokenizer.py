"""Text becomes the same ids in ONNX Runtime GenAI and in `tokenizers`, or the tokenizer is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from tokenizers import Tokenizer

from cpcompile.core.errors import UsageError
from cpcompile.core.generation import GenerationSettings
from cpcompile.exporters.genai_exporter import write_json, write_tokenizer
from cpcompile.exporters.genai_tokenizer import GPT2, genai_tokenizer
from cpcompile.text.corpus import Corpus

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SETTINGS = GenerationSettings(end=(0,), leading=(0,), chat_template=TEMPLATE)
LINES = 3000
SCRIPTS = {
    "latin": (0x20, 0x24F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "thai": (0xE00, 0xE7F),
    "georgian": (0x10A0, 0x10FF),
    "hangul": (0xAC00, 0xD7A3),
    "kana": (0x3040, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "emoji": (0x1F300, 0x1F64F),
}
BLANKS = " \t\n\r\v\f\u00a0\u2003\u3000\u2028  \n\n  "
PIECES = ["'s", "'t", "'RE", "'ve", "'ll", "don't", "<|endoftext|>", "٣", "²", "Ⅷ", "१२", "!?", "...", "==", "()", "#"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Digits", "individual_digits": True}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "smollm": sequence(DIGITS, BYTE_LEVEL),
    "split": sequence(split(GPT2), {**BYTE_LEVEL, "use_regex": False}),
    "three digits": sequence(sequence(split(r"\p{N}{1,3}")), BYTE_LEVEL),
}


def lines() -> Iterator[str]:
    """Words of twelve scripts, blanks, numbers and signs in any order; U+0085 and NUL, which differ, are left out."""
    rng = np.random.default_rng(0)
    ranges = list(SCRIPTS.values())
    for _ in range(LINES):
        words = []
        for kind in rng.integers(0, 4, rng.integers(1, 14)):
            if kind == 0:
                words.append("".join(rng.choice(list(BLANKS), rng.integers(1, 6))))
            elif kind == 1:
                words.append(rng.choice(PIECES))
            elif kind == 2:
                words.append(str(rng.integers(0, 10 ** rng.integers(1, 9))))
            else:
                low, high = ranges[rng.integers(len(ranges))]
                words.append("".join(map(chr, rng.integers(low, high + 1, rng.integers(1, 9)))).replace("\x85", ""))
        yield "".join(words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the least from which GenAI makes a tokenizer besides its own files."""
    write_json(tmp_path / "genai_config.json", {"model": {"type": "decoder", "context_length": 64}})
    return tmp_path


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_both_sides_make_the_same_ids(name: str, corpus: Corpus, folder: Path) -> None:
    original = json.loads(corpus.tokenizer) | {"pre_tokenizer": PRE_TOKENIZERS[name]}
    write_tokenizer(folder, genai_tokenizer(original, SETTINGS, "tokenizer.json"))
    ours, theirs = Tokenizer.from_str(json.dumps(original)), og.Tokenizer(str(folder))
    rewritten = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for line in lines():
        ids = ours.encode(line, add_special_tokens=False).ids
        assert theirs.encode(line).tolist() == ids, line
        assert rewritten.encode(line, add_special_tokens=False).ids == ids, line
        stream = theirs.create_stream()
        plain = line.replace("<|endoftext|>", "")
        assert ours.decode(ids) == plain and (theirs.decode(ids) == plain or not plain)
        assert "".join(map(stream.decode, ids)) == plain


def test_the_config_names_special_tokens_and_keeps_the_chat_template(corpus: Corpus, folder: Path) -> None:
    made = genai_tokenizer(json.loads(corpus.tokenizer), SETTINGS, "tokenizer.json")
    assert made.config == {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    write_tokenizer(folder, made)
    theirs = og.Tokenizer(str(folder))
    messages = json.dumps([{"role": "user", "content": "Hi "}, {"role": "user", "content": "there"}])
    assert theirs.apply_chat_template(messages=messages, add_generation_prompt=False) == "Hi there"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": sequence(split(LLAMA3), {**BYTE_LEVEL, "use_regex": False})}, "texts that are split by "),
        (
            {"pre_tokenizer": sequence({**DIGITS, "individual_digits": False}, BYTE_LEVEL)},
            "the pre-tokenizer {",
        ),
        (
            {"pre_tokenizer": sequence(BYTE_LEVEL, DIGITS)},
            "the pre-tokenizer Digits at the end",
        ),
        ({"pre_tokenizer": sequence({**split(GPT2), "behavior": "Removed"}, BYTE_LEVEL)}, "the pre-tokenizer {"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "the setting add_prefix_space"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "texts that are not split at all"),
        ({"pre_tokenizer": None}, "the pre-tokenizer none at the end"),
        ({"normalizer": {"type": "NFC"}}, "the normalizer NFC"),
        ({"decoder": None}, "BPE whose tokens are not bytes"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "the model WordPiece"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "the model Unigram"),
    ],
)
def test_what_it_would_read_differently_is_refused(change: dict[str, Any], reason: str, corpus: Corpus) -> None:
    with pytest.raises(UsageError) as refused:
        genai_tokenizer(json.loads(corpus.tokenizer) | change, SETTINGS, "tokenizer.json")
    assert f"tokenizer.json: ONNX Runtime GenAI does not read {reason}" in str(refused.value)
    assert "--no-tokenizer" in str(refused.value)


def test_tokens_that_it_treats_in_its_own_way_are_refused(corpus: Corpus) -> None:
    tokenizer = json.loads(corpus.tokenizer)
    tokenizer["added_tokens"][0]["lstrip"] = True
    with pytest.raises(UsageError, match="lstrip of the token '<.endoftext.>'"):
        genai_tokenizer(tokenizer, SETTINGS, "tokenizer.json")
    tokenizer = json.loads(corpus.tokenizer)
    tokenizer["model"]["vocab"]["qzxj"] = len(tokenizer["model"]["vocab"])
    with pytest.raises(UsageError, match="the token 'qzxj', which merges do not make of its own text"):
        genai_tokenizer(tokenizer, SETTINGS, "tokenizer.json")
