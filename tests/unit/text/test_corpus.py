"""Corpus: formats, split, tokenizer, cache, errors. Everything runs on real files in small folders."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cpcompile.core.errors import UsageError
from cpcompile.text import documents as text_sources
from cpcompile.text.corpus import Corpus, load_corpus
from cpcompile.text.documents import find_sources, pieces
from cpcompile.text.tokenization import END, leading_tokens, parse_tokenizer, train_tokenizer, vocabulary_size

ODD = (
    "\ufeffWindows\r\nline\r\n\x00\x07\x1b[0m tab\t trailing  \n\n\n"
    " \U0001f469\u200d\U0001f4bb \u6f22\u5b57 <|endoftext|> e\u0301 \u00e9 <s>"
)
LETTERS = {"de": "abcdefgh", "fr": "mnopqrst", "py": "stuvwxyz"}


def documents_of(context: str, count: int = 40, words: int = 60, seed: int = 0) -> list[str]:
    """Made-up documents of lines of words over the context's own letters."""
    rng = random.Random(f"{context} {seed}")
    letters = LETTERS[context]

    def document(number: int) -> str:
        made = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(words)]
        lines = [" ".join(made[i : i + 8]) for i in range(0, words, 8)]
        return f"{context} {number}\n" + "\n".join(lines) + "\n"

    return [document(number) for number in range(count)]


def write_folder(path: Path, documents: Sequence[str]) -> None:
    path.mkdir(parents=True)
    for number, text in enumerate(documents):
        (path / f"{number:04d}.txt").write_bytes(text.encode())


def write_json_lines(path: Path, documents: Sequence[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)), "utf-8")


def write_gzip(path: Path, documents: Sequence[str], field: str = "text") -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({field: text}) + "\n" for text in documents)


def write_parquet(path: Path, documents: Sequence[str], field: str = "text") -> None:
    parquet.write_table(pa.table({field: list(documents), "id": range(len(documents))}), path, row_group_size=7)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for context in ("de", "fr"):
        write_folder(tmp_path / "data" / context, documents_of(context))
    return tmp_path / "data"


def load(data: Path, cache: Path | None = None, **changes: Any) -> Corpus:
    keywords: dict[str, Any] = {"vocabulary": 300, "sequence": 16, "held_out_fraction": 0.2, "seed": 0}
    return load_corpus(data, cache=cache or data.parent / "cache", **(keywords | changes))


def texts(corpus: Corpus, context: str, side: str) -> list[str]:
    """The documents of one side, decoded from the ids."""
    tokenizer = parse_tokenizer(corpus.tokenizer)
    file = getattr(corpus, side)[context]
    ends = np.flatnonzero(file.ids == tokenizer.token_to_id(END))
    assert len(ends) == file.documents
    assert ends[-1] == len(file.ids) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(file.ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def token_files(corpus: Corpus) -> list[Path]:
    return [Path(str(file.ids.filename)) for side in (corpus.train, corpus.held_out) for file in side.values()]  # type: ignore[attr-defined]


def cache_folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def python(code: str, *arguments: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **keywords)


LOAD = """
import sys, os, json, resource, signal
from pathlib import Path
from cpcompile.core.errors import CpcompileError
from cpcompile.text.corpus import load_corpus
def load(data, cache, progress=None, **changes):
    keywords = dict(vocabulary=300, sequence=16, held_out_fraction=0.2, seed=0) | changes
    return load_corpus(Path(data), cache=Path(cache), progress=progress, **keywords)
"""


class TestFormats:
    @pytest.mark.parametrize(
        ("suffix", "write"),
        [("", write_folder), (".jsonl", write_json_lines), (".jsonl.gz", write_gzip), (".parquet", write_parquet)],
    )
    def test_documents_come_back_unchanged(self, data: Path, suffix: str, write: Callable[..., None]) -> None:
        documents = [*documents_of("py"), ODD, "x" * 40000, "\n\nleading"]
        write(data / f"PY{suffix}", documents)
        corpus = load(data)
        assert corpus.contexts == ("de", "fr", "py")
        train, held_out = texts(corpus, "py", "train"), texts(corpus, "py", "held_out")
        assert sorted(train + held_out) == sorted(documents)
        assert [text for text in documents if text in train] == train  # the order of the source
        assert 2 <= len(held_out) <= 16

    def test_text_file_is_cut_into_documents_of_paragraphs(self, data: Path) -> None:
        paragraphs = [text + "\n" for text in documents_of("py", count=120)]
        text = "".join(paragraphs)
        (data / "py.txt").write_bytes(text.encode())
        found = list(find_sources(data)[2].documents())
        assert "".join(found) == text
        assert len(found) == -(-len(text) // 8192)
        assert all(len(document) <= 8192 and document.endswith("\n\n") for document in found)
        corpus = load(data)
        assert sorted(texts(corpus, "py", "train") + texts(corpus, "py", "held_out")) == sorted(found)

    def test_block_borders_do_not_show(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "".join(documents_of("py", count=100)).replace("s", "\u6f22\r")
        (data / "py.txt").write_bytes(text.encode())
        whole = list(find_sources(data)[2].documents())
        monkeypatch.setattr(text_sources, "BLOCK", 1000)
        assert list(find_sources(data)[2].documents()) == whole
        assert "".join(whole) == text

    def test_text_field(self, data: Path) -> None:
        for context, write in (("jl", write_json_lines), ("gz", write_gzip), ("pq", write_parquet)):
            suffix = {"jl": ".jsonl", "gz": ".jsonl.gz", "pq": ".parquet"}[context]
            write(data / f"{context}{suffix}", documents_of("py"), "body")
        corpus = load(data, text_field="body")
        for context in ("jl", "gz", "pq"):
            assert sorted(texts(corpus, context, "train") + texts(corpus, context, "held_out")) == sorted(
                documents_of("py")
            )
        assert len({corpus.digests[context] for context in ("jl", "gz", "pq")}) == 1

    def test_blank_lines_byte_order_mark_and_empty_documents_are_left_out(self, data: Path) -> None:
        lines = "\ufeff" + "\n".join(json.dumps({"text": text}) for text in ("a", " \n", "", "b")) + "\n\n \n"
        (data / "py.jsonl").write_text(lines, "utf-8")
        (data / "de" / "empty.py").write_bytes(b"")
        sources = find_sources(data)
        assert list(sources[2].documents()) == ["a", "b"]
        assert list(sources[0].documents()) == documents_of("de")

    def test_sorted_nested_hidden_and_linked_files(self, data: Path, tmp_path: Path) -> None:
        folder = data / "py"
        for name in ("b/one", "a", "b.txt", "b/.hidden", ".git/config"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        elsewhere = tmp_path / "elsewhere"
        (elsewhere / "deep").mkdir(parents=True)
        (elsewhere / "deep" / "c").write_text("elsewhere")
        (elsewhere / "back").symlink_to(folder)
        (folder / "z").symlink_to(elsewhere)
        (folder / "again").symlink_to(elsewhere / "deep")
        (folder / "inside").symlink_to("a")
        (folder / "loop").symlink_to(folder)
        os.mkfifo(folder / "pipe")
        (data / ".DS_Store").write_text("hidden")
        assert list(find_sources(data)[2].documents()) == ["a", "elsewhere", "b.txt", "b/one"]

    def test_a_corpus_of_links_is_that_of_its_files(self, data: Path, tmp_path: Path) -> None:
        """Folders, files and the data folder itself; in the form of the Hugging Face hub's cache as well."""
        write_json_lines(data / "py.jsonl", documents_of("py"))
        linked, blobs = tmp_path / "linked", tmp_path / "blobs"
        linked.mkdir()
        blobs.mkdir()
        for number, entry in enumerate(sorted(data.iterdir())):
            if entry.is_dir() and number % 2:
                (linked / entry.name).symlink_to(entry)
                continue
            for path in [entry] if entry.is_file() else sorted(entry.iterdir()):
                blob = blobs / f"{number}-{path.name}".replace(".", "-")
                blob.write_bytes(path.read_bytes())
                link = linked / path.relative_to(data)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))
        (tmp_path / "whole").symlink_to(linked)
        plain, through = find_sources(data), find_sources(tmp_path / "whole")
        assert [source.context for source in plain] == [source.context for source in through]
        for one, other in zip(plain, through, strict=True):
            assert list(one.documents()) == list(other.documents())
            assert one.fingerprint() == other.fingerprint()

    @pytest.mark.parametrize("name", ["py/below", "py.txt", "py"])
    def test_a_link_to_nothing_is_not_skipped(self, data: Path, name: str) -> None:
        if "/" in name:
            (data / "py").mkdir(exist_ok=True)
        for target in ("nothing", Path(name).name):  # the second leads to itself
            (data / name).symlink_to(target)
            with pytest.raises(UsageError, match=rf"{name}: is a link to {target}, which is not there"):
                find_sources(data)
            (data / name).unlink()

    @pytest.mark.parametrize("name", ["py/a", "py.txt", "py.jsonl", "py.jsonl.gz", "py.parquet"])
    @pytest.mark.parametrize(
        ("pointer", "command"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
            (b"/annex/objects/SHA256E-s12--4d7a.txt\n", "git annex get"),
        ],
    )
    def test_a_pointer_is_not_taken_for_text(self, data: Path, name: str, pointer: bytes, command: str) -> None:
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(pointer)
        with pytest.raises(UsageError, match=rf"{name}: is a pointer of .*; run `{command}`"):
            load(data)

    @given(st.lists(st.text(alphabet="ab \n\r\u00e9", max_size=60)), st.integers(1, 12))
    def test_pieces_are_short_and_lose_nothing(self, blocks: list[str], limit: int) -> None:
        found = list(pieces(blocks, limit))
        assert "".join(found) == "".join(blocks)
        assert all(0 < len(piece) <= limit for piece in found)

    def test_pieces_prefer_blank_lines_then_lines_then_spaces(self) -> None:
        assert list(pieces(["aa\n\nbb\ncc dd"], 9)) == ["aa\n\n", "bb\ncc dd"]
        assert list(pieces(["bb\ncc dd ee"], 9)) == ["bb\n", "cc dd ee"]
        assert list(pieces(["cc dd ee"], 6)) == ["cc dd", " ee"]
        assert list(pieces(["ccddee"], 4)) == ["ccdd", "ee"]


class TestSplit:
    def test_a_new_document_moves_no_other(self, data: Path) -> None:
        before = load(data)
        (data / "de" / "0000a.txt").write_text("a new document that comes second\n")
        after = load(data)
        new = {"a new document that comes second\n"}
        for side in ("train", "held_out"):
            assert set(texts(after, "de", side)) - new == set(texts(before, "de", side))
            assert texts(after, "fr", side) == texts(before, "fr", side)
        assert before.digests["de"] != after.digests["de"]
        assert before.digests["fr"] == after.digests["fr"]

    def test_names_do_not_matter_the_seed_does(self, data: Path) -> None:
        before = load(data)
        (data / "de" / "0000.txt").rename(data / "de" / "9999.txt")
        assert set(texts(load(data), "de", "held_out")) == set(texts(before, "de", "held_out"))
        other = load(data, seed=1)
        assert set(texts(other, "de", "held_out")) != set(texts(before, "de", "held_out"))

    def test_fraction(self, data: Path) -> None:
        write_json_lines(data / "py.jsonl", documents_of("py", count=2000, words=10))
        corpus = load(data, held_out_fraction=0.1)
        assert 150 <= corpus.held_out["py"].documents <= 250  # binomial: 200 +- 13.4
        assert corpus.train["py"].documents == 2000 - corpus.held_out["py"].documents

    def test_copies_stay_on_one_side(self, data: Path) -> None:
        documents = documents_of("py")
        write_json_lines(data / "py.jsonl", documents * 3)
        write_json_lines(data / "py2.jsonl", documents)
        corpus = load(data)
        held_out = {*texts(corpus, "py", "held_out"), *texts(corpus, "py2", "held_out")}
        train = {*texts(corpus, "py", "train"), *texts(corpus, "py2", "train")}
        assert held_out
        assert not held_out & train
        assert held_out | train == set(documents)

    @pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
    def test_two_documents_give_both_sides(self, data: Path, fraction: float) -> None:
        write_json_lines(data / "py.jsonl", documents_of("py", count=2) * 2)
        for seed in range(5):
            corpus = load(data, held_out_fraction=fraction, seed=seed)
            train, held_out = texts(corpus, "py", "train"), texts(corpus, "py", "held_out")
            assert len(train) == len(held_out) == 2
            assert {*train} | {*held_out} == {*documents_of("py", count=2)}

    def test_one_document_is_cut_at_a_line(self, data: Path) -> None:
        text = "".join(documents_of("py", count=20))
        write_folder(data / "py", [text])
        corpus = load(data, held_out_fraction=0.1)
        (train,), (held_out,) = texts(corpus, "py", "train"), texts(corpus, "py", "held_out")
        assert train + held_out == text
        assert train.endswith("\n")
        assert abs(len(held_out) / len(text) - 0.1) < 0.01

    @pytest.mark.parametrize(("first", "second"), [(30, 70), (99, 1), (1, 99)])
    def test_one_document_is_cut_at_its_only_line_end(self, data: Path, first: int, second: int) -> None:
        write_folder(data / "py", ["s " * first + "\n" + "t " * second])
        corpus = load(data, sequence=1, vocabulary=257)
        assert texts(corpus, "py", "train") == ["s " * first + "\n"]
        assert texts(corpus, "py", "held_out") == ["t " * second]

    @pytest.mark.parametrize(("fraction", "words"), [(0.1, " "), (0.99, " "), (0.1, "")])
    def test_one_document_without_lines(self, data: Path, fraction: float, words: str) -> None:
        text = words.join("".join(random.Random(0).choices("stuvwxyz", k=4)) for _ in range(300))
        text = text[:-1] + "\n"  # a line end that would leave nothing to hold out
        write_folder(data / "py", [text])
        corpus = load(data, held_out_fraction=fraction, sequence=1)
        (train,), (held_out,) = texts(corpus, "py", "train"), texts(corpus, "py", "held_out")
        assert train + held_out == text
        assert abs(len(held_out) / len(text) - fraction) < 0.02
        assert train.endswith(words)


class TestTokenizer:
    TOKENIZER = train_tokenizer(documents_of("de") + documents_of("fr"), 400)

    @settings(max_examples=300, deadline=None)
    @given(st.text() | st.text(alphabet="\r\n\t \x00\x1b\U0001f600\u200d\ufe0f\u0301ab<|endoftext|>"))
    def test_every_string_comes_back(self, text: str) -> None:
        ids = self.TOKENIZER.encode(text).ids
        assert self.TOKENIZER.decode(ids) == text
        assert self.TOKENIZER.token_to_id(END) not in ids

    def test_odd_string_through_the_stored_tokenizer(self, data: Path) -> None:
        tokenizer = parse_tokenizer(load(data).tokenizer)
        assert tokenizer.decode(tokenizer.encode(ODD).ids) == ODD

    def test_vocabulary_is_a_maximum(self, data: Path) -> None:
        assert load(data).vocabulary == 300
        short = load(data, vocabulary=100_000)
        assert 300 < short.vocabulary < 10_000
        assert short.vocabulary == parse_tokenizer(short.tokenizer).get_vocab_size()
        assert load(data, vocabulary=257).vocabulary == 257

    def test_ids_are_as_small_as_the_vocabulary_allows(self, data: Path, tmp_path: Path) -> None:
        small = load(data)
        assert {file.ids.dtype for file in small.train.values()} == {np.dtype(np.uint16)}
        tokenizer = train_tokenizer(documents_of("de"), 300)
        tokenizer.add_tokens([f"filler{i}" for i in range(70_000)])
        tokenizer.save(str(tmp_path / "large.json"))
        large = load(data, tokenizer=tmp_path / "large.json", vocabulary=100_000)
        assert {file.ids.dtype for file in large.train.values()} == {np.dtype(np.uint32)}
        assert texts(large, "fr", "train") == texts(small, "fr", "train")

    def test_every_context_weighs_the_same(self, data: Path) -> None:
        """With a large and a small context, words of both become tokens."""
        word = "zyxwvuzyxwvu"
        write_folder(data / "py", [f"{word} {number} {word}\n" * 3 for number in range(10)])
        write_json_lines(data / "large.jsonl", documents_of("de", count=2000, words=40))
        tokenizer = parse_tokenizer(load(data, vocabulary=320).tokenizer)
        assert len(tokenizer.encode(f" {word}").ids) == 1

    def test_given_tokenizer(self, data: Path, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        bare = Tokenizer(models.BPE(vocab=letters, merges=[]))
        bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        bare.enable_truncation(5)
        bare.save(str(path))
        corpus = load(data, tokenizer=path)
        assert corpus.vocabulary == 257  # END came in addition
        assert corpus.tokenizer != load(data).tokenizer
        assert sorted(texts(corpus, "de", "train") + texts(corpus, "de", "held_out")) == sorted(documents_of("de"))

    def test_given_tokenizer_errors(self, data: Path, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        with pytest.raises(UsageError, match=r"tokenizer\.json: cannot be read \(No such file"):
            load(data, tokenizer=path)
        for content in (b"{}", b"not json", b"\xff"):
            path.write_bytes(content)
            with pytest.raises(UsageError, match=r"tokenizer\.json: is not a tokenizer\.json"):
                load(data, tokenizer=path)
        lower = parse_tokenizer(self.TOKENIZER.to_str())
        lower.normalizer = normalizers.Lowercase()
        lower.save(str(path))
        with pytest.raises(UsageError, match=r"tokenizer\.json: changes text .* byte-level"):
            load(data, tokenizer=path, vocabulary=400)
        with pytest.raises(UsageError, match=r"has 400 entries .* raise model\.vocabulary to 400"):
            load(data, tokenizer=path, vocabulary=399)

    def test_size_counts_the_largest_id(self) -> None:
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))
        assert vocabulary_size(tokenizer) == 10


def with_leading(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    """`tokenizer`, which now puts `tokens` in front of every text, and its last entry behind it."""
    tokenizer.add_special_tokens([*tokens, "<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*tokens, "$A", "<end>"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*tokens, "<end>")],
    )
    return tokenizer


@pytest.mark.parametrize("tokens", [(), ("<s>",), ("<s>", "<lang>")])
def test_leading_tokens(tokens: tuple[str, ...]) -> None:
    tokenizer = with_leading(train_tokenizer(documents_of("de"), 300), *tokens)
    leading = tuple(tokenizer.token_to_id(token) for token in tokens)
    assert leading_tokens(tokenizer.to_str()) == leading
    tokenizer.enable_padding(direction="left", length=64)
    tokenizer.enable_truncation(1)
    assert leading_tokens(tokenizer.to_str()) == leading


class TestWindows:
    def test_batch_is_a_pure_function(self, data: Path) -> None:
        corpus = load(data)
        first = corpus.batch("de", step=3, sequences=5, length=16, seed=1)
        corpus.batch("fr", step=9, sequences=2, length=4, seed=0)
        assert first.shape == (5, 17)
        assert first.dtype == np.int64
        assert type(first) is np.ndarray
        np.testing.assert_array_equal(first, corpus.batch("de", step=3, sequences=5, length=16, seed=1))
        for other in ({"step": 4}, {"seed": 2}):
            changed = corpus.batch("de", **({"step": 3, "sequences": 5, "length": 16, "seed": 1} | other))
            assert not np.array_equal(first, changed)

    def test_batch_takes_windows_of_the_training_ids(self, data: Path) -> None:
        corpus = load(data)
        ids = corpus.train["fr"].ids.astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(ids, 17)
        batch = corpus.batch("fr", step=0, sequences=8, length=16, seed=0)
        assert all((windows == row).all(axis=1).any() for row in batch)
        longest = corpus.batch("fr", step=0, sequences=3, length=len(ids) - 1, seed=0)
        np.testing.assert_array_equal(longest, np.tile(ids, (3, 1)))
        starts = {
            tuple(row)
            for s in range(200)
            for row in corpus.batch("fr", step=s, sequences=1, length=len(ids) - 3, seed=0)
        }
        assert starts == {tuple(ids[start : start + len(ids) - 2]) for start in range(3)}  # both ends are reached

    def test_contexts_draw_apart(self, data: Path) -> None:
        shutil.copytree(data / "de", data / "de2")
        corpus = load(data)
        np.testing.assert_array_equal(corpus.train["de"].ids, corpus.train["de2"].ids)
        keywords = {"step": 0, "sequences": 4, "length": 16, "seed": 0}
        assert not np.array_equal(corpus.batch("de", **keywords), corpus.batch("de2", **keywords))

    def test_held_out_windows(self, data: Path) -> None:
        corpus = load(data)
        ids = corpus.held_out["de"].ids.astype(np.int64)
        windows = corpus.held_out_windows("de", length=16, tokens=100)
        assert windows.shape == (6, 17)
        assert windows.dtype == np.int64
        np.testing.assert_array_equal(windows[:, :-1].ravel(), ids[:96])
        np.testing.assert_array_equal(windows[:, 1:].ravel(), ids[1:97])
        assert corpus.held_out_windows("de", length=16, tokens=1).shape == (1, 17)
        assert corpus.held_out_windows("de", length=16, tokens=10**9).shape == ((len(ids) - 1) // 16, 17)
        whole = corpus.held_out_windows("de", length=len(ids) - 1, tokens=10**9)
        np.testing.assert_array_equal(whole, ids[None])

    def test_leading_tokens_start_every_window(self, data: Path, tmp_path: Path) -> None:
        made = with_leading(parse_tokenizer(load(data).tokenizer), "<s>", "<lang>")
        made.save(str(tmp_path / "tokenizer.json"))
        corpus = load(data, tokenizer=tmp_path / "tokenizer.json", vocabulary=600)
        assert corpus.leading == tuple(made.token_to_id(token) for token in ("<s>", "<lang>"))
        ids = corpus.held_out["de"].ids.astype(np.int64)
        assert not np.isin(corpus.leading, ids).any()
        windows = corpus.held_out_windows("de", length=16, tokens=100)
        assert windows.shape == (7, 17)
        np.testing.assert_array_equal(windows[:, :2], np.tile(corpus.leading, (7, 1)))
        np.testing.assert_array_equal(windows[:, 3:].ravel(), ids[1:99])  # each token is predicted once
        training = np.lib.stride_tricks.sliding_window_view(corpus.train["fr"].ids.astype(np.int64), 15)
        for row in corpus.batch("fr", step=0, sequences=8, length=16, seed=0):
            assert tuple(row[:2]) == corpus.leading
            assert (training == row[2:]).all(axis=1).any()
        with pytest.raises(UsageError, match=r"train\.sequence is 2: the tokenizer's own 2 leading tokens fill it"):
            corpus.batch("fr", step=0, sequences=8, length=2, seed=0)

    def test_too_long(self, data: Path) -> None:
        corpus = load(data)
        with pytest.raises(
            UsageError, match=r"context 'de': .* training tokens are too few for one sequence of 1000000"
        ):
            corpus.batch("de", step=0, sequences=1, length=10**6, seed=0)
        with pytest.raises(UsageError, match=r"context 'de': .* held-out tokens are too few"):
            corpus.held_out_windows("de", length=len(corpus.held_out["de"].ids), tokens=1)


class TestCache:
    def test_the_same_everywhere(self, data: Path, tmp_path: Path) -> None:
        corpus = load(data)
        code = LOAD + "load(sys.argv[1], sys.argv[2])"
        environment = os.environ | {"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
        assert python(code, data, tmp_path / "other", env=environment).returncode == 0
        (mine,), (other,) = cache_folders(tmp_path / "cache"), cache_folders(tmp_path / "other")
        assert mine.name == other.name
        files = sorted(path.relative_to(mine) for path in mine.rglob("*") if path.is_file())
        assert len(files) == 2 + 2 * len(corpus.contexts)
        assert all((mine / name).read_bytes() == (other / name).read_bytes() for name in files)

    def test_reused_when_unchanged(self, data: Path) -> None:
        first = load(data)
        before = [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in token_files(first)]
        stages: list[str] = []
        second = load(data, progress=lambda stage, *_: stages.append(stage))
        os.utime(data / "de" / "0000.txt", (0, 0))  # touched, not changed
        third = load(data)
        for corpus in (second, third):
            assert [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in token_files(corpus)] == before
        assert stages == []
        assert (second.tokenizer, second.vocabulary, second.digests) == (
            first.tokenizer,
            first.vocabulary,
            first.digests,
        )
        moved = data.rename(data.with_name("moved"))
        assert token_files(load(moved)) == token_files(first)

    def test_rebuilt_when_data_changed(self, data: Path) -> None:
        file = data / "de" / "0000.txt"
        first, state = load(data), file.stat()
        file.write_bytes(file.read_bytes().replace(b"a", b"h"))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert file.stat().st_size == state.st_size  # same size, same time: only the content tells
        second = load(data)
        assert file.read_text() in texts(second, "de", "train") + texts(second, "de", "held_out")
        assert second.digests["de"] != first.digests["de"]
        file.unlink()
        third = load(data)
        assert third.train["de"].documents + third.held_out["de"].documents == 39

    def test_a_large_context_goes_by_times(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_sources, "CONTENT_LIMIT", 0)
        first = load(data)
        assert token_files(load(data)) == token_files(first)
        os.utime(data / "de" / "0000.txt", (0, 0))
        assert token_files(load(data)) != token_files(first)

    @pytest.mark.parametrize(
        "change",
        [{"vocabulary": 301}, {"seed": 1}, {"held_out_fraction": 0.3}, {"text_field": "body"}],
        ids=lambda change: next(iter(change)),
    )
    def test_settings_have_their_own_cache(self, data: Path, change: dict[str, Any]) -> None:
        assert not set(token_files(load(data))) & set(token_files(load(data, **change)))

    def test_sequence_does_not_rebuild(self, data: Path) -> None:
        assert token_files(load(data)) == token_files(load(data, sequence=20))

    @staticmethod
    def damages() -> dict[str, Callable[[Path], object]]:
        return {
            "short ids": lambda folder: os.truncate(folder / "ids/de/train", 10),
            "long ids": lambda folder: os.truncate(folder / "ids/de/train", 10**6),
            "no ids": lambda folder: (folder / "ids/fr/held_out").unlink(),
            "no index": lambda folder: (folder / "index.json").unlink(),
            "broken index": lambda folder: os.truncate(folder / "index.json", 30),
            "other index": lambda folder: (folder / "index.json").write_text("[]"),
            "index without a context's side": lambda folder: (folder / "index.json").write_text(
                (folder / "index.json").read_text().replace("held_out", "elsewhere")
            ),
            "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
            "changed tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
        }

    @pytest.mark.parametrize("damage", damages().values(), ids=damages().keys())
    def test_a_damaged_cache_is_rebuilt(self, data: Path, damage: Callable[[Path], object]) -> None:
        first = load(data)
        expected = {path: path.read_bytes() for path in token_files(first)}
        (folder,) = cache_folders(data.parent / "cache")
        damage(folder)
        second = load(data)
        assert {path: path.read_bytes() for path in token_files(second)} == expected
        assert (second.tokenizer, second.digests) == (first.tokenizer, first.digests)

    @pytest.mark.parametrize("stage", ["read", "tokenizer", "tokens"])
    def test_killed_build_leaves_nothing_that_is_used(self, data: Path, tmp_path: Path, stage: str) -> None:
        kill = """
        def progress(stage, done, total):
            if stage == sys.argv[3] and done:
                os.kill(os.getpid(), signal.SIGKILL)
        load(sys.argv[1], sys.argv[2], progress)
        """
        killed = python(LOAD + textwrap.dedent(kill), data, tmp_path / "cache", stage)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        left = cache_folders(tmp_path / "cache")
        assert [".building-" in path.name for path in left] == ([True] if stage == "tokens" else [])
        rebuilt, fresh = load(data), load(data, tmp_path / "fresh")
        for mine, other in zip(token_files(rebuilt), token_files(fresh), strict=True):
            assert mine.read_bytes() == other.read_bytes()
        assert [path.suffix for path in cache_folders(tmp_path / "cache")] == [""]

    def test_an_exception_leaves_nothing(self, data: Path, tmp_path: Path) -> None:
        def stop(stage: str, done: int, total: int | None) -> None:
            if stage == "tokens" and done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            load(data, progress=stop)
        assert cache_folders(tmp_path / "cache") == []

    def test_one_of_three_processes_builds(self, data: Path, tmp_path: Path) -> None:
        write_json_lines(data / "py.jsonl", documents_of("py", count=2000))
        code = """
        stages = []
        corpus = load(sys.argv[1], sys.argv[2], lambda *state: stages.append(state[0]))
        print(json.dumps([stages, corpus.batch("py", step=0, sequences=1, length=16, seed=0).tolist()]))
        """
        command = [sys.executable, "-c", LOAD + textwrap.dedent(code), str(data), str(tmp_path / "cache")]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        (one, batch), *others = (json.loads(process.communicate(timeout=120)[0]) for process in running)
        assert all(other[1] == batch for other in others)
        assert sum("tokens" in stages for stages in (one, *(other[0] for other in others))) == 1

    def test_default_folder(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keywords: dict[str, Any] = {"vocabulary": 300, "sequence": 16, "held_out_fraction": 0.2, "seed": 0}
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert token_files(load_corpus(data, **keywords))[0].is_relative_to(tmp_path / "xdg" / "cpcompile")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for value in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            corpus = load_corpus(data, **keywords)
            assert token_files(corpus)[0].is_relative_to(tmp_path / "home" / ".cache" / "cpcompile")

    def test_a_file_in_place_of_the_cache(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("")
        with pytest.raises(UsageError, match=r"cache: cannot be written .* choose another cache folder"):
            load(data)

    FULL = """
    try:
        load(sys.argv[1], sys.argv[2])
    except CpcompileError as error:
        print(type(error).__name__, error.exit_code, error)
        print([name for name in os.listdir(sys.argv[2]) if not name.endswith(".lock")])
    """

    def check_full(self, result: subprocess.CompletedProcess[str], cache: Path, reason: str) -> None:
        assert result.stdout.startswith(f"CpcompileError 1 {cache}: no room for the token files of about 0."), result
        assert f" MB: {reason}; make room there or choose another cache folder\n[]\n" in result.stdout

    def test_file_size_limit(self, data: Path, tmp_path: Path) -> None:
        code = LOAD + "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n" + textwrap.dedent(self.FULL)
        self.check_full(python(code, data, tmp_path / "cache"), tmp_path / "cache", "File too large")

    def test_full_disk(self, data: Path, tmp_path: Path) -> None:
        """A file system of 16 kB, mounted in a name space of the child's own."""
        cache = tmp_path / "cache"
        cache.mkdir()
        mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=16k none "{cache}" && exec "$@"', "sh"]
        if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
            pytest.skip("this machine does not allow mounts in a user name space")
        command = [*mount, sys.executable, "-c", LOAD + textwrap.dedent(self.FULL), str(data), str(cache)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        self.check_full(result, cache, "No space left on device")


class TestErrors:
    @staticmethod
    def fail(data: Path, match: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=match):
            load(data, **changes)

    def test_no_folder(self, tmp_path: Path) -> None:
        self.fail(tmp_path / "missing", "missing: is not a folder; give a folder")
        (tmp_path / "file").write_text("")
        self.fail(tmp_path / "file", "file: is not a folder")

    def test_number_of_contexts(self, data: Path) -> None:
        shutil.rmtree(data / "de")
        self.fail(data, "data: holds only the context 'fr' and at least two are needed; put one sub-folder")
        shutil.rmtree(data / "fr")
        self.fail(data, "data: holds no context and at least two are needed")

    @pytest.mark.parametrize("name", ["a b.txt", "_x.jsonl", "\u00e9.txt", "a,b", "router", "router.txt"])
    def test_context_names(self, data: Path, name: str) -> None:
        (data / name).mkdir() if "." not in name else (data / name).write_text("x")
        self.fail(data, rf"data/{name}: '.*' cannot name a context; a name has lower-case letters, .*; rename it")

    def test_two_entries_of_one_name(self, data: Path) -> None:
        (data / "DE.txt").write_text("x")
        self.fail(data, "data/de and .*data/DE.txt are both the context 'de'; join them")

    def test_entries_that_are_no_text(self, data: Path, tmp_path: Path) -> None:
        (data / "readme.md").write_text("x")
        self.fail(data, "data/readme.md: is none of .txt, .jsonl, .jsonl.gz, .parquet and no folder")
        (data / "readme.md").unlink()
        os.mkfifo(data / "py.txt")
        self.fail(data, "data/py.txt: is not a regular file")

    @pytest.mark.parametrize("documents", [[], ["", " \n\t"]])
    def test_empty_context(self, data: Path, documents: list[str]) -> None:
        write_folder(data / "py", documents)
        self.fail(data, "data/py: context 'py' has no text; add some, or take it away")

    def test_too_short(self, data: Path) -> None:
        write_folder(data / "py", ["x", "y" * 100])
        for held_out, training in ((2, 101), (101, 2)):  # by chance of the seed
            seed = next(
                s
                for s in range(20)
                if len(texts(load(data, seed=s, sequence=1, vocabulary=257), "py", "held_out")[0]) == held_out - 1
            )
            side, other = (
                ("held-out", "raise train.held_out_fraction") if held_out < training else ("training", "lower")
            )
            self.fail(
                data,
                f"data/py: context 'py': 2 {side} tokens are too few for one sequence of 2 and .* {other}",
                seed=seed,
                sequence=2,
                vocabulary=257,
            )

    def test_one_character(self, data: Path) -> None:
        write_folder(data / "py", ["x"])
        self.fail(data, "data/py: context 'py': 0 held-out tokens are too few", sequence=1)

    @pytest.mark.parametrize("tail", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80"], ids=["never", "cut off", "surrogate"])
    @pytest.mark.parametrize("name", ["py.txt", "py/deep/file.c"])
    def test_not_utf8(self, data: Path, name: str, tail: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_sources, "BLOCK", 6)
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes("12345\u20ac89".encode() + tail)
        self.fail(data, rf"data/{name}: is not UTF-8 text \(byte 10\); convert it")

    @pytest.mark.parametrize(
        ("line", "match"),
        [
            (b"{", r"py\.jsonl:3: is not valid JSON \(.*every line has to be one object"),
            (b"[" * 100_000, r"py\.jsonl:3: is not valid JSON"),
            (b"9" * 5000, r"py\.jsonl:3: is not valid JSON"),
            (b"[1]", r"py\.jsonl:3: is not a JSON object"),
            (b'{"id": 1, "body": ""}', r"py\.jsonl:3: there is no field 'text', only id, body; name"),
            (b"{}", r"py\.jsonl:3: there is no field 'text', only none"),
            (b'{"text": null}', r"py\.jsonl:3: field 'text' is NoneType, not text"),
            (rb'{"text": "\ud800"}', r"py\.jsonl:3: field 'text' holds half a surrogate pair"),
            (b'{"text": "\xff"}', r"py\.jsonl:3: is not UTF-8 text \(byte 25\)"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_json_lines(self, data: Path, suffix: str, line: bytes, match: str) -> None:
        content = b'{"text": "a"}\n\n' + line + b"\n"
        (data / f"py.jsonl{suffix}").write_bytes(gzip.compress(content) if suffix else content)
        self.fail(data, match.replace(r"\.jsonl", rf"\.jsonl{suffix}"))

    @pytest.mark.parametrize(
        "spoil",
        [lambda raw: raw[:-20], lambda raw: b"text", lambda raw: raw[:40] + bytes(20) + raw[60:]],
        ids=["cut off", "no gzip", "overwritten"],
    )
    def test_broken_gzip(self, data: Path, spoil: Callable[[bytes], bytes]) -> None:
        path = data / "py.jsonl.gz"
        write_gzip(path, documents_of("py"))
        path.write_bytes(spoil(path.read_bytes()))
        self.fail(data, r"data/py\.jsonl\.gz: is not a whole gzip file \(.*fetch it again")

    def test_broken_parquet(self, data: Path) -> None:
        path = data / "py.parquet"
        write_parquet(path, documents_of("py"))
        whole = path.read_bytes()
        for content in (whole[:-50], b"", b"text", whole[:10] + b"\xff" * 2000 + whole[2010:]):
            path.write_bytes(content)
            self.fail(data, r"data/py\.parquet: is not a whole Parquet file")

    @pytest.mark.parametrize(
        ("column", "match"),
        [
            (pa.array(["a", None, "b"]), r"py\.parquet, row 2: field 'text' is NoneType, not text"),
            (pa.array([1, 2]), r"py\.parquet, row 1: field 'text' is int, not text"),
            (
                pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")),
                r"py\.parquet, row 2: is not UTF-8 text",
            ),
        ],
        ids=["null", "numbers", "bytes"],
    )
    def test_parquet_values(self, data: Path, column: pa.Array, match: str) -> None:
        parquet.write_table(pa.table({"text": column}), data / "py.parquet")
        self.fail(data, match)

    def test_parquet_without_the_field(self, data: Path) -> None:
        write_parquet(data / "py.parquet", documents_of("py"), "body")
        self.fail(data, r"data/py\.parquet: there is no field 'text', only body, id; name")

    def test_parquet_without_pyarrow(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_parquet(data / "py.parquet", documents_of("py"))
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        self.fail(data, r"data/py\.parquet: Parquet needs the package pyarrow")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"vocabulary": 256}, "model.vocabulary is 256: .* at least 257"),
            ({"held_out_fraction": 0.0}, "train.held_out_fraction is 0.0: it lies between 0 and 1"),
            ({"held_out_fraction": 1.0}, "train.held_out_fraction is 1.0"),
            ({"sequence": 0}, "train.sequence is 0"),
            ({"seed": -1}, "train.seed is -1"),
        ],
    )
    def test_settings(self, data: Path, change: dict[str, Any], match: str) -> None:
        self.fail(data, match, **change)

    def test_data_that_changes_meanwhile(self, data: Path) -> None:
        """An error in the tokenizer's own reading of the data is not lost in the library."""

        def remove(stage: str, done: int, total: int | None) -> None:
            if stage == "tokenizer" and not done:
                (data / "fr" / "0007.txt").unlink()

        self.fail(data, r"fr/0007\.txt: cannot be read \(No such file", progress=remove)


class TestScale:
    def test_progress(self, data: Path) -> None:
        calls: list[tuple[str, int, int | None]] = []
        load(data, progress=lambda *state: calls.append(state))
        size = sum(path.stat().st_size for path in data.rglob("*.txt"))
        assert list(dict.fromkeys(stage for stage, *_ in calls)) == ["read", "tokenizer", "tokens"]
        assert calls[0] == ("read", 0, size) and ("read", size, size) in calls
        assert calls[-1] == ("tokens", size, size)
        assert len(calls) < 60
        for stage in ("read", "tokenizer", "tokens"):
            done = [state[1] for state in calls if state[0] == stage]
            assert done == sorted(done)
        ends = [state for state in calls if state[0] == "tokenizer"]
        assert 0.9 < ends[-1][1] / (ends[-1][2] or 1) < 1.1

    def test_neither_torch_nor_pyarrow_is_imported(self, data: Path, tmp_path: Path) -> None:
        code = LOAD + "load(*sys.argv[1:]); assert not {'torch', 'pyarrow'} & set(sys.modules)"
        result = python(code, data, tmp_path / "cache")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    @pytest.mark.slow
    def test_memory_does_not_grow_with_the_corpus(self, tmp_path: Path) -> None:
        """25 MB of text are built in the memory of 5 MB of text, up to noise."""
        code = """
        load(sys.argv[1], sys.argv[2])
        print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        """
        peak: dict[int, float] = {}
        for megabytes in (5, 25):
            data = tmp_path / f"data{megabytes}"
            data.mkdir()
            block = [text.replace("\n", " ") for text in documents_of("de", count=400, words=300)]
            for context, write in (("de", write_text_repeated), ("py", write_json_repeated)):
                write(data, context, block, megabytes * 500_000)
            result = python(LOAD + textwrap.dedent(code), data, tmp_path / "cache")
            peak[megabytes] = int(result.stdout) / 1024
        assert peak[25] - peak[5] < 8, peak

    def test_parquet_goes_by_row_group(self, data: Path) -> None:
        group, groups = 2**18, 32
        with parquet.ParquetWriter(data / "py.parquet", pa.schema([("text", pa.string())])) as writer:
            for number in range(groups):
                writer.write_table(pa.table({"text": [f"{number} {i} " + "x" * (group // 16) for i in range(16)]}))
        start = pa.total_allocated_bytes()
        used = [pa.total_allocated_bytes() - start for _ in find_sources(data)[2].documents()]
        assert len(used) == 16 * groups
        assert max(used) < 4 * group, max(used)


def numbered(block: Sequence[str], size: int) -> Iterator[str]:
    """Different documents of `size` characters in all."""
    written = number = 0
    while written < size:
        text = f"{number} {block[number % len(block)]}"
        number, written = number + 1, written + len(text)
        yield text


def write_text_repeated(data: Path, context: str, block: Sequence[str], size: int) -> None:
    with (data / f"{context}.txt").open("w") as stream:
        stream.writelines(text + "\n\n" for text in numbered(block, size))


def write_json_repeated(data: Path, context: str, block: Sequence[str], size: int) -> None:
    with (data / f"{context}.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in numbered(block, size))
