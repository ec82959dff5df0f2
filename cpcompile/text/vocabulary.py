"""Trim a tokenizer to the tokens that a context's text needs.

    kept = the most frequent tokens | their merge paths | bytes | added tokens and what post-processing names

BPE merges the pair of lowest rank first. Where it ends with a token, nothing was merged across that token's
borders: inside them it did what it does to the token's string alone. So every token has one merge
path, wherever it stands. A trimmed list of merges that holds this path, in the old order, takes the same steps:
the lowest of all pairs is the lowest of some pairs that it is among. Text whose tokens are all kept
therefore has the same tokens as before; any other text has more, and is still the same text.

Unigram takes the best sum of scores. A trimmed vocabulary offers no better sum than before, so closure needs only the
lowest score, which sets the (constant) penalty of an unknown character.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from cpcompile.core.errors import CpcompileError, UsageError

Counts = Mapping[int, int] | npt.NDArray[np.integer[Any]]
"""How often each token id occurs: by id, or an array that the id indexes."""
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""The tokens of byte fallback."""
END = "<|endoftext|>"
"""The token that ends every document of a corpus."""
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>")
"""The names of that token in other tokenizers."""
_NEVER = 1 << 62
_MEMBERS = ("normalizers", "pretokenizers", "processors", "decoders")


@dataclass(frozen=True, eq=False)
class TrimmedVocabulary:
    """A tokenizer with fewer tokens, and their previous ids."""

    tokenizer_json: str
    kept: npt.NDArray[np.int64]
    """The old id of every new id."""


def needed_tokens(tokenizer_json: str, counts: Counts, *, coverage: float) -> npt.NDArray[np.int64]:
    """The most frequent tokens that make up `coverage` (0 to 1) of all `counts`, and what they need: ids, ascending.

    tokenizer_json: the text of a tokenizer.json whose model is BPE or Unigram over bytes (ByteLevel or byte
    fallback); counts: of the context's text. Cut to these tokens it encodes and decodes every string as losslessly as
    before. UsageError for any other tokenizer, and for counts of tokens that it does not have.
    """
    data, ids = _open(tokenizer_json)
    tokens = {number: token for token, number in ids.items()}
    if len(tokens) < len(ids):
        raise UsageError("the tokenizer gives one id to several tokens; number its tokens apart")
    frequent = [tokens[number] for number in _most_frequent(counts, tokens, coverage)]
    named = {container[key] for container, key in _places(data)}
    if unknown := named - tokens.keys():
        raise UsageError(f"the tokenizer names the id {min(unknown)}, which no token has; correct its tokenizer.json")
    needed = {ids[token] for token in (*frequent, *_alphabet(data), *_companions(data["model"], frequent))}
    return np.array(sorted(needed | named), dtype=np.int64)


def order_tokens(tokenizer_json: str, kept: Sequence[npt.NDArray[np.int64]], rows: int) -> npt.NDArray[np.int64]:
    """An order of the ids 0 to `rows` - 1 in which tokens that the same of the sets `kept` hold lie side by side.

    Tokens of more sets come first. Those that stand outside of the model keep their place behind it; a Unigram
    vocabulary, whose ids are positions, keeps its order.
    """
    data, ids = _open(tokenizer_json)
    if data["model"]["type"] == "Unigram":
        return np.arange(rows)
    held = np.zeros((rows, len(kept)), dtype=np.bool_)
    for column, numbers in enumerate(kept):
        held[numbers, column] = True
    outside = np.zeros(rows, dtype=np.bool_)
    outside[[number for token, number in ids.items() if token not in data["model"]["vocab"]]] = True
    held[outside] = False
    # The last key weighs most; equal tokens keep their order.
    order = np.lexsort((*held.T[::-1] ^ True, -held.sum(axis=1), outside))
    return np.asarray(order, dtype=np.int64)


def cut_tokenizer(tokenizer_json: str, kept: npt.NDArray[np.int64]) -> TrimmedVocabulary:
    """The tokenizer with the tokens `kept` alone, in that order: old ids, closed as `needed_tokens` makes them."""
    data, ids = _open(tokenizer_json)
    tokens = {number: token for token, number in ids.items()}
    new = {old: number for number, old in enumerate(kept.tolist())}
    for container, key in _places(data):
        container[key] = new[container[key]]
    _cut(data["model"], new)
    trimmed = json.dumps(data, ensure_ascii=False)
    if _load(trimmed).get_vocab(with_added_tokens=True) != {tokens[old]: number for old, number in new.items()}:
        raise CpcompileError("the trimmed tokenizer numbers its tokens in another way; this is a defect of cpcompile")
    return TrimmedVocabulary(trimmed, kept)


def reencode(ids: npt.NDArray[np.integer[Any]], whole: str, trimmed: TrimmedVocabulary) -> npt.NDArray[np.int64]:
    """The text of old `ids`, documents ended by one of ENDS, in tokens of `trimmed`; `whole` is the old tokenizer."""
    before, after = _load(whole), _load(trimmed.tokenizer_json)
    after.encode_special_tokens = True  # text that spells a special token is text
    end = end_of(before)
    old_end, new_end = before.token_to_id(end), after.token_to_id(end)
    if old_end is None or new_end is None:
        raise UsageError(f"the tokenizer has no token {end!r}, which ends a document")
    documents = np.split(ids, np.flatnonzero(ids == old_end) + 1)
    new: list[int] = []
    for document in documents:
        if ended := bool(document.size) and document[-1] == old_end:
            document = document[:-1]
        new += after.encode(before.decode(document.tolist(), skip_special_tokens=False), add_special_tokens=False).ids
        new += [new_end] if ended else []
    return np.asarray(new, dtype=np.int64)


def end_of(tokenizer: Tokenizer) -> str:
    """The token that ends a document: the first of ENDS that the tokenizer has, or END."""
    return next((end for end in ENDS if tokenizer.token_to_id(end) is not None), END)


def _open(tokenizer_json: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The JSON in one form, whichever version wrote the file, and the ids of all tokens."""
    tokenizer = _load(tokenizer_json)
    return json.loads(tokenizer.to_str()), tokenizer.get_vocab(with_added_tokens=True)


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing more specific
        raise UsageError(f"this is no tokenizer.json: {error}") from error


def _most_frequent(counts: Counts, tokens: Mapping[int, str], coverage: float) -> list[int]:
    """The shortest list of ids, the most frequent first, that makes up `coverage` of the text."""
    if not 0 < coverage <= 1:
        raise UsageError(f"coverage is {coverage}; a fraction above 0 and up to 1 is needed")
    pairs = counts.items() if isinstance(counts, Mapping) else enumerate(np.asarray(counts).tolist())
    used = {int(number): int(count) for number, count in pairs if count}
    if not used:
        raise UsageError("the counts are all zero: count the tokens of the context's text")
    if wrong := [number for number, count in used.items() if count < 0 or number not in tokens]:
        raise UsageError(f"token {wrong[0]} is counted {used[wrong[0]]} times; count ids that the tokenizer has")
    order = sorted(used, key=lambda number: (-used[number], number))
    covered = np.cumsum([used[number] for number in order], dtype=np.int64)
    return order[: int(np.searchsorted(covered, coverage * int(covered[-1]))) + 1]


def _places(data: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The places of ids outside of the model, as containers and keys."""
    for token in data["added_tokens"]:
        yield token, "id"
    if data["padding"]:
        yield data["padding"], "pad_id"
    for processor in _parts(data["post_processor"]):
        for special in processor.get("special_tokens", {}).values():  # TemplateProcessing
            for index in range(len(special["ids"])):
                yield special["ids"], index
        for pair in (processor[key] for key in ("sep", "cls") if key in processor):  # Bert, Roberta: [token, id]
            yield pair, 1


def _parts(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a Sequence of normalizers, pre-tokenizers, processors or decoders; else `section` itself."""
    if section is None:
        return []
    inner = [
        part for key in ("normalizers", "pretokenizers", "processors", "decoders") for part in section.get(key, ())
    ]
    return [leaf for part in inner for leaf in _parts(part)] if section["type"] == "Sequence" else [section]


def _alphabet(data: Mapping[str, Any]) -> set[str]:
    """The tokens without which some text would be lost: the bytes that the tokenizer knows."""
    model = data["model"]
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] not in ("BPE", "Unigram") or affixes:
        form = " with ".join([model["type"], *affixes[:1]])
        raise UsageError(f"a tokenizer of type {form} cannot be trimmed; BPE and Unigram over bytes can")
    known = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"].keys()
    around = [part for key in ("normalizer", "pre_tokenizer", "decoder") for part in _parts(data[key])]
    if model["byte_fallback"] and known >= BYTES:
        # Characters that the tokenizer itself writes, such as ▁ for a space: the decoder would not know their bytes.
        return set(BYTES) | {char for part in around for text in _strings(part) for char in text if char in known}
    if any(part["type"] == "ByteLevel" for part in around):
        return set(ByteLevel.alphabet()) & known
    raise UsageError(
        f"a {model['type']} tokenizer without all bytes loses the characters that are trimmed; "
        "give a byte-level tokenizer or one with byte_fallback and its 256 tokens <0x00> to <0xFF>"
    )


def _strings(section: Any) -> Iterator[str]:
    """All strings in a part of the tokenizer, except its type."""
    if isinstance(section, str):
        yield section
    elif isinstance(section, Mapping):
        for key, value in section.items():
            if key != "type":
                yield from _strings(value)


def _companions(model: Mapping[str, Any], frequent: Sequence[str]) -> Iterator[str]:
    """What the model needs in order to find the `frequent` tokens as before, and its unknown token."""
    if model["type"] == "Unigram":
        vocabulary = model["vocab"]
        yield min(vocabulary, key=lambda entry: entry[1])[0]
        if model["unk_id"] is not None:
            yield vocabulary[model["unk_id"]][0]
        return
    if model["unk_token"] is not None:
        yield model["unk_token"]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    for token in frequent:
        yield from merge_path(token, ranks)


def merge_path(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Every symbol that BPE passes through on its way to `token`.

    Empty if merges do not lead there: such a token is found whole (added, a byte, or with `ignore_merges`) or never.
    """
    symbols = list(token)
    seen = set(symbols)
    while len(symbols) > 1:
        found = [ranks.get(pair, _NEVER) for pair in pairwise(symbols)]
        at = found.index(min(found))
        if found[at] == _NEVER:
            return set()
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        seen.add(symbols[at])
    return seen


def _cut(model: dict[str, Any], new: Mapping[int, int]) -> None:
    """Leave in `model` only the tokens in `new`, and the merges whose three tokens all remain."""
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
        return
    vocabulary = {token: new[number] for token, number in model["vocab"].items() if number in new}
    model["vocab"] = vocabulary
    model["merges"] = [
        [left, right] for left, right in model["merges"] if {left, right, left + right} <= vocabulary.keys()
    ]
