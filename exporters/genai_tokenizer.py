r"""A tokenizer.json, rewritten so that ONNX Runtime GenAI makes the same ids of a text, and its tokenizer_config.json.

GenAI reads byte-level BPE. It splits a text in front of BPE by regular expressions that it knows by their wording, and
silently ignores the rest: normalizers, `Digits`, `ByteLevel.use_regex`, the behavior of a `Split`. So the pre-tokenizer
becomes a sequence of expressions that both sides were found to split by alike:

    ByteLevel                 ->  Split(GPT2), ByteLevel(use_regex = false)
    Digits, ByteLevel         ->  Split(\p{N}), Split(GPT2), ByteLevel(use_regex = false)

What cannot be written in this way is refused, among it the expressions of Llama 3 and Qwen: GenAI splits line breaks
followed by blanks in another way. These differences are left: GenAI does not take U+0085 for a blank, does not know the
letters and digits that Unicode has had since version 14, and its C interface ends a text at a NUL.
Source: microsoft/onnxruntime-extensions, operators/tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tokenizers import Tokenizer

from cpcompile.core.errors import UsageError
from cpcompile.core.generation import GenerationSettings

Json = Mapping[str, Any]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
SAME_ON_BOTH_SIDES = (GPT2, DIGIT, r"\p{N}{1,3}")
CLASS = "GPT2Tokenizer"
"""The class by which GenAI reads byte-level BPE and adds no tokens of its own."""
UNREAD_OF_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
UNREAD_OF_TOKENS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class GenaiTokenizer:
    """The contents of tokenizer.json and tokenizer_config.json."""

    tokenizer: Json
    config: Json


def genai_tokenizer(tokenizer: Json, settings: GenerationSettings, where: str) -> GenaiTokenizer:
    """Rewrite `tokenizer`, the content of the file `where`; UsageError names what GenAI would read differently."""
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    _require_byte_level_bpe(tokenizer, where)
    for token in added:
        if unread := [key for key in UNREAD_OF_TOKENS if token[key]]:
            _refuse(where, f"{unread[0]} of the token {token['content']!r}")
    splits = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in _expressions(tokenizer["pre_tokenizer"], where)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    names = {number: name for name, number in model["vocab"].items()} | {each["id"]: each["content"] for each in added}
    special = {"bos_token": settings.leading, "eos_token": settings.end, "pad_token": settings.end}
    config = {
        "tokenizer_class": CLASS,
        "add_bos_token": False,
        "add_eos_token": False,
        **{key: names[ids[0]] for key, ids in special.items() if ids},
        **({"chat_template": settings.chat_template} if settings.chat_template is not None else {}),
    }
    return GenaiTokenizer(
        {**tokenizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]}}, config
    )


def _require_byte_level_bpe(tokenizer: Json, where: str) -> None:
    model, decoder, normalizer = tokenizer["model"], tokenizer["decoder"], tokenizer["normalizer"]
    if model.get("type") != "BPE":
        _refuse(where, f"the model {model.get('type')}")
    if decoder is None or decoder["type"] != "ByteLevel":
        _refuse(where, "BPE whose tokens are not bytes")
    if unread := [key for key in UNREAD_OF_BPE if model.get(key)]:
        _refuse(where, f"the setting {unread[0]}")
    if normalizer is not None:
        _refuse(where, f"the normalizer {normalizer['type']}")
    if not model.get("ignore_merges") and (token := _unmade_token(tokenizer)) is not None:
        _refuse(where, f"the token {token!r}, which merges do not make of its own text")


def _unmade_token(tokenizer: Json) -> str | None:
    """A token that GenAI takes for a whole word, and `tokenizers` does not; added tokens are found before."""
    added = {token["content"] for token in tokenizer["added_tokens"]}
    bare: Json = {
        "pre_tokenizer": None,
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "added_tokens": [],
    }
    merges = Tokenizer.from_str(json.dumps({**tokenizer, **bare}))
    words = [token for token in tokenizer["model"]["vocab"] if token not in added]
    made = merges.encode_batch(words, add_special_tokens=False)
    return next((word for word, each in zip(words, made, strict=True) if len(each.ids) != 1), None)


def _expressions(pre_tokenizer: Json | None, where: str) -> list[str]:
    """The regular expressions that split a text one after the other as `pre_tokenizer` does."""
    found: list[str] = []
    *before, last = list(_steps(pre_tokenizer)) or [{"type": "none"}]
    if last["type"] != "ByteLevel":
        _refuse(where, f"the pre-tokenizer {last['type']} at the end")
    if last["add_prefix_space"]:
        _refuse(where, "the setting add_prefix_space")
    for step in before:
        match step:
            case {"type": "Digits", "individual_digits": True}:
                found.append(DIGIT)
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                if expression not in SAME_ON_BOTH_SIDES:
                    _refuse(where, f"texts that are split by {expression}")
                found.append(expression)
            case _:
                _refuse(where, f"the pre-tokenizer {json.dumps(step)}")
    found += [GPT2] if last["use_regex"] else []
    if not found:
        _refuse(where, "texts that are not split at all")
    return found


def _steps(pre_tokenizer: Json | None) -> Iterator[Json]:
    """The pre-tokenizers in a possibly nested sequence."""
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Sequence":
        for each in pre_tokenizer["pretokenizers"]:
            yield from _steps(each)
    elif pre_tokenizer is not None:
        yield pre_tokenizer


def _refuse(where: str, what: str) -> NoReturn:
    raise UsageError(
        f"{where}: ONNX Runtime GenAI does not read {what} as `tokenizers` does; export with --no-tokenizer, and make "
        "the token ids with `tokenizers`"
    )
