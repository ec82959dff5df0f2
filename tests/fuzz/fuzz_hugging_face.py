"""Tiny models of every class that transformers can build from a small config: partitioned, or refused with a sentence.

    python -m tests.fuzz.fuzz_hugging_face [--only NAME,…] [--seconds 600] [--parts 2 --part 0]

A model is built with random weights, saved, read from its folder and partitioned; a causal language model is read as a
pretrained one as well. Anything but a result or one sentence is a finding. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.partitioning import PartitionedModule, partition
from cpcompile.partitioning.hugging_face import load_hugging_face
from cpcompile.partitioning.pretrained import PretrainedDecoder, read_pretrained
from tests.unit.partitioning.models import assert_accounted

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("encoder_hidden_size", "word_embed_proj_dim", "hidden_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk", "first_k_dense_replace"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("d_inner", "ffn_hidden_size", "inner_dim", "vocab_size", "max_position_embeddings"), 64),
    **dict.fromkeys(("n_positions", "n_ctx", "context_length", "max_seq_len", "sliding_window"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size", "mamba_d_head", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "patch_size", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("moe_intermediate_size", "kv_lora_rank", "q_lora_rank", "shared_expert_intermediate_size"), 16),
    **{"image_size": 32, "window_size": 4, "n_group": 1, "topk_group": 1, "num_channels": 3, "type_vocab_size": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""Settings of configs, where they have them."""
LISTS = {"hidden_sizes": 32, "embed_dims": 32, "depths": 1, "num_heads": 2, "num_attention_heads": 2}
"""The same, where a config has a list with a value per stage."""
LARGEST = 3_000_000
"""Parameters of a model that counts as tiny."""
SECONDS = 60
"""For one model."""


@dataclass(frozen=True)
class Outcome:
    """What became of a class: partitioned, refused, finding, or left out because it cannot be built tiny."""

    name: str
    result: str
    text: str = ""


def classes() -> list[str]:
    """The names of causal and masked language models, encoders and image models of transformers, each once."""
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    entries = [entry for table in tables for entry in table.values()]
    return list(dict.fromkeys(name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)))


def tiny(name: str) -> Any:
    """A model of class `name` with few parameters; any exception if it cannot be built like this."""
    import transformers

    kind = getattr(transformers, name)
    config = small(kind.config_class)
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    return kind(config).eval()


def small(kind: Any) -> Any:
    """A config with the settings of SMALL that it has, and sub-configs made alike."""
    plain = kind()
    settings = {name: value for name, value in SMALL.items() if type(_of(plain, name)) is int or name in _IDS}
    if settings.get("max_position_embeddings") and _of(plain, "max_position_embeddings") < 0:
        del settings["max_position_embeddings"]  # XLNet: -1, and no other
    for name, sub in (kind.sub_configs or {}).items():
        if _of(plain, name) is not None:
            settings[name] = small(type(getattr(plain, name)) if sub.__name__ == "AutoConfig" else sub)
    for name, value in LISTS.items():
        if isinstance(_of(plain, name), (list, tuple)):
            settings[name] = [value] * len(_of(plain, name))
    return kind(**settings)


def _of(config: Any, name: str) -> Any:
    """A setting; None if it has none, or none that is the same for all layers."""
    try:
        return getattr(config, name, None)
    except (NotImplementedError, AttributeError, ValueError):
        return None


_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def outcome(name: str, folder: Path) -> Outcome:
    """Build, save, read and partition a model of class `name`."""
    try:
        with limited(SECONDS):
            tiny(name).save_pretrained(folder)
    except (Exception, _TooLongError) as error:
        return Outcome(name, "left out", f"{type(error).__name__}: {str(error).splitlines()[:1]}")
    said = []
    try:
        with limited(SECONDS):
            said.append(_partitioned(folder))
            if name.endswith(("ForCausalLM", "LMHeadModel")):
                said.append(_pretrained(folder))
    except _TooLongError:
        return Outcome(name, "left out", "takes too long")
    except Exception:
        return Outcome(name, "finding", traceback.format_exc())
    refused = [text for text in said if text]
    lines = [text for text in refused if not _is_a_sentence(text)]
    if lines:
        return Outcome(name, "finding", "\n".join(lines))
    return Outcome(name, "refused" if refused else "partitioned", "; ".join(refused))


def _partitioned(folder: Path) -> str:
    """Why the model in `folder` cannot be partitioned; nothing if it can."""
    try:
        ready = load_hugging_face(folder)
        module = partition(
            ready.model, ready.example_inputs, forward=ready.forward, dynamic_shapes=ready.dynamic_shapes, align=8
        )
    except UsageError as error:
        return str(error)
    _require_equal(module)
    assert_accounted(module)
    return ""


def _pretrained(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    try:
        read = read_pretrained(folder)
        PretrainedDecoder(read.config, contexts=1)
    except UsageError as error:
        return str(error)
    return ""


def _require_equal(module: PartitionedModule) -> None:
    """Gates that are 0 change the output, or the module has no gates at work."""
    module.eval()
    with torch.no_grad():
        before = module.outputs.of(module(*module.example_inputs, context=torch.tensor(0)))
    if not all(torch.isfinite(value).all() for value in before if value.is_floating_point()):
        raise CpcompileError("outputs that are not finite")


def _is_a_sentence(text: str) -> bool:
    """One line, or lines of reasons below it, none of them empty or too long to read."""
    first, *rest = text.split("\n")
    return 0 < len(first) < 600 and all(line.startswith("  ") for line in rest)


class _TooLongError(BaseException):
    """Not an Exception: that would become a refusal of the model."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcomes(names: list[str], seconds: float = float("inf")) -> Iterator[Outcome]:
    """One per class, as long as `seconds` last."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end = time.monotonic() + seconds
    for name in names:
        if time.monotonic() > end:
            return
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield outcome(name, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--part", type=int, default=0)
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else classes()[arguments.part :: arguments.parts]
    counts: Counter[str] = Counter()
    for each in outcomes(names, arguments.seconds):
        counts[each.result] += 1
        print(f"{each.name}: {each.result} {each.text}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())))
    return int(counts["finding"] > 0)


if __name__ == "__main__":
    sys.exit(main())
