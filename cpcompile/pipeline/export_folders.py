"""`cpcompile export`: folders of engines for other programs, which need more than the engines as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from cpcompile.bundle.reader import Bundle, Variant, open_bundle
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.generation import GenerationSettings
from cpcompile.exporters.genai_exporter import export_genai, write_tokenizer
from cpcompile.exporters.genai_tokenizer import genai_tokenizer
from cpcompile.exporters.triton_exporter import export_triton
from cpcompile.files.whole_files import unfinished
from cpcompile.passes.keep_last_logits import KeepLastLogits
from cpcompile.pipeline.export import exported_variant


def export_genai_folder(
    path: Path, contexts: Sequence[str], out: Path, *, variant: str, tokenizer: bool = True
) -> None:
    """A folder for ONNX Runtime GenAI, or one for each of several contexts, which share a weights file.

    tokenizer: whether GenAI gets a tokenizer too; if not, the folder has the tokenizer.json of the bundle.
    """
    bundle = open_bundle(path)
    chosen = {context: exported_variant(bundle, context, variant) for context in contexts}
    texts = {context: bundle.tokenizer(context) for context in contexts}
    models = {context: _with_last_logits(each) for context, each in chosen.items()}
    settings = {context: _settings(bundle, context) for context in contexts}
    read = {context: json.loads(text.read_text(encoding="utf-8")) for context, text in texts.items()}
    own = {c: genai_tokenizer(read[c], settings[c], str(texts[c])) for c in contexts if tokenizer}
    with _whole_folder(bundle, out) as folder:
        options = {context: each.session_options for context, each in chosen.items()}
        folders = export_genai(models, folder, settings=settings, session_options=options)
        for context, target in folders.items():
            if context in own:
                write_tokenizer(target, own[context])
            else:
                (target / "tokenizer.json").write_bytes(texts[context].read_bytes())


def export_triton_repository(path: Path, contexts: Sequence[str], out: Path, *, variant: str) -> Variant:
    """A model repository for NVIDIA Triton with one model for each context; returns the engine of the first."""
    bundle = open_bundle(path)
    chosen = {context: exported_variant(bundle, context, variant) for context in contexts}
    with _whole_folder(bundle, out) as folder:
        for context, each in chosen.items():
            each.save_standalone(export_triton(each.graph().graph, folder, context))
    return chosen[contexts[0]]


def _with_last_logits(variant: Variant) -> ir.Model:
    """The graph of `variant` with the logits of one position; UsageError if it reads whole texts only."""
    model = variant.graph()
    if not KeepLastLogits()(model).modified:
        raise UsageError(
            f"{variant.model}: has no cache of keys and values, which ONNX Runtime GenAI needs; choose the variant "
            "cpu-fp32, and build the bundle again if it was built before engines had a cache"
        )
    return model


def _settings(bundle: Bundle, context: str) -> GenerationSettings:
    """What the bundle records for generating text; UsageError if no token ends a text."""
    settings = bundle.generation(context)
    if settings is None or not settings.end:
        raise UsageError(
            f"{bundle.root}: no token ends the texts of {context!r}, and ONNX Runtime GenAI needs one; name it in the "
            "settings of the model (eos_token_id), and build the bundle again"
        )
    return settings


@contextmanager
def _whole_folder(bundle: Bundle, out: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes `out` when the block ends without an error."""
    target = out.resolve()
    if target.is_relative_to(bundle.root.resolve()):
        raise UsageError(f"{out}: lies in the bundle; choose another --out")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{out}: exists, so it is kept; remove it or choose another --out")
    try:
        with unfinished(target, folder=True) as temporary:
            yield temporary
            temporary.rename(target)
    except OSError as error:
        raise CpcompileError(
            f"{out}: cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from error
