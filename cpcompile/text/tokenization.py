"""Byte-level BPE: every string becomes token ids and comes back unchanged.

The alphabet is the 256 bytes, so nothing is unknown; merges are learned on top (arXiv 1508.07909,
GPT-2's pre-tokenisation). `<|endoftext|>` ends every document. It is the only special token, and
text that spells it out is encoded as ordinary bytes: only the corpus can end a document.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cpcompile.core.errors import UsageError
from cpcompile.files.pointers import require_fetched
from cpcompile.text.vocabulary import END, end_of

LEAST_VOCABULARY = 257
"""The bytes and `END`."""
PROBE = f"Aa  1\t\r\n\x00\x7f \u00e9e\u0301 \u6f22 \U0001f600\u200d  <s>{END} \ufeff."
COMPOSED_PROBE = unicodedata.normalize("NFC", PROBE)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer learned from `texts` with at most `vocabulary` entries (`LEAST_VOCABULARY` or more).

    It has fewer where no pair of tokens repeats. The same texts in the same order give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return parse_tokenizer(tokenizer.to_str())


def read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with `END` added if it has none of ENDS, and without truncation and padding.

    UsageError if it cannot be read, has more than `vocabulary` entries or changes text (but to another
    spelling of the same characters: Unicode's composed form).
    """
    require_fetched(path)
    try:
        tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of a tokenizer.json") from error
    except ValueError as error:
        raise UsageError(f"{path}: is not a tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([end_of(tokenizer)])
    entries = vocabulary_size(tokenizer)
    if entries > vocabulary:
        raise UsageError(
            f"{path}: has {entries} entries with {END}, more than model.vocabulary {vocabulary}; "
            f"raise model.vocabulary to {entries} or give a smaller tokenizer"
        )
    if unknown := [n for n in leading_tokens(tokenizer.to_str()) if tokenizer.id_to_token(n) is None]:
        raise UsageError(f"{path}: puts the id {unknown[0]} in front of text, which no token has; correct the file")
    if tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False).ids) not in (PROBE, COMPOSED_PROBE):
        raise UsageError(f"{path}: changes text (it normalises it or lacks bytes); give a byte-level tokenizer")
    return tokenizer


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer in the text of a tokenizer.json, set to take special tokens in text as text; else ValueError."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(str(error)) from error
    tokenizer.encode_special_tokens = True  # not part of the JSON
    return tokenizer


def leading_tokens(tokenizer_json: str) -> tuple[int, ...]:
    """The ids that the tokenizer puts in front of every text, such as that of a BOS token; most tokenizers put none.

    A model that was trained with them predicts badly where they are missing, so every window of its text starts with
    them. They are given, never predicted.
    """
    tokenizer = parse_tokenizer(tokenizer_json)
    tokenizer.no_padding()  # which may stand in front as well
    tokenizer.no_truncation()
    encoding = tokenizer.encode("a")
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(number for number, _ in takewhile(lambda pair: pair[1], marked))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: one more than the largest id (a given tokenizer may leave ids out)."""
    return max(tokenizer.get_vocab().values()) + 1
