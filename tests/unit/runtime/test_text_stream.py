"""Text that comes token by token is the text that comes at once, in whole characters, up to a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cpcompile.runtime.text_stream import INCOMPLETE, TextStream

BYTES = Tokenizer(
    models.BPE(vocab={each: n for n, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
)
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES.decoder = decoders.ByteLevel()
"""One token a byte."""
WORDS = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
WORDS.decoder = decoders.Metaspace()
"""A decoder that drops the space in front of a text."""


def streamed(ids: list[int], stop: tuple[str, ...] = (), prompt: tuple[int, ...] = ()) -> list[str]:
    stream, pieces = TextStream(BYTES, prompt, stop), []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@given(st.text(), st.text(max_size=3))
def test_pieces_are_whole_characters_of_the_text(text: str, before: str) -> None:
    pieces = streamed(BYTES.encode(text).ids, prompt=tuple(BYTES.encode(before).ids))
    assert "".join(pieces) == text
    assert all(piece == "" or INCOMPLETE not in piece or INCOMPLETE in text for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_are_decoded_as_at_once(ids: list[int]) -> None:
    assert "".join(streamed(ids)) == BYTES.decode(ids)


@given(st.text("ab<>é", max_size=12), st.lists(st.text("ab<>é", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    written = "".join(streamed(BYTES.encode(text).ids, tuple(stop)))
    found = [(at + len(each), at) for each in stop if (at := text.find(each)) >= 0]
    # Of stop strings that overlap, the one that is complete first counts.
    assert written == (text[: min(found)[1]] if found else text)


def test_a_space_between_prompt_and_text_is_kept() -> None:
    stream = TextStream(WORDS, [0])
    assert [stream.add(1), stream.add(2), stream.add(0), stream.finish()] == [" b", "c", " a", ""]


def test_a_stop_string_may_be_cut_by_tokens() -> None:
    assert "".join(streamed(BYTES.encode("one END two").ids, ("END",))) == "one "
    assert "".join(streamed(BYTES.encode("one EN").ids, ("END",))) == "one EN"
