"""ONNX Runtime GenAI: engines with a cache -> folders that `onnxruntime_genai.Model` runs.

    DIR/model.onnx  DIR/weights.bin  DIR/genai_config.json  DIR/tokenizer.json  DIR/tokenizer_config.json

Several contexts have such a folder each, DIR/<context>, and one DIR/weights.bin, where each tensor is stored once.
Source: ONNX Runtime GenAI, docs/genai/reference/config, and src/config.cpp for what is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from cpcompile.bundle.reader import WEIGHTS_OPTION
from cpcompile.core.cache import HEADS, IN_PLACE, INPUT, MASK, OUTPUT, PAST, POSITIONS, past_name, present_name
from cpcompile.core.generation import GenerationSettings
from cpcompile.exporters.genai_tokenizer import GenaiTokenizer
from cpcompile.exporters.weights_file import INLINE, refer_to_weights, write_weights

WEIGHTS_FILE, MODEL_FILE = "weights.bin", "model.onnx"
UNLIMITED = 1 << 17
"""The context length of models without a limit: GenAI needs a number."""
DEFAULT_LENGTH = 2048
"""The most tokens of a text, prompt included, unless the program that generates says otherwise."""


def export_genai(
    models: Mapping[str, ir.Model],
    folder: Path,
    *,
    settings: Mapping[str, GenerationSettings],
    session_options: Mapping[str, Mapping[str, str]],
) -> dict[str, Path]:
    """Write `models`, context -> graph with the logits of one position, into the existing `folder`.

    Returns the folder of each context, which is `folder` itself if there is one context.
    """
    alone = len(models) == 1
    folders = {context: folder if alone else folder / context for context in models}
    share_weights(models, folder / WEIGHTS_FILE)
    for context, model in models.items():
        folders[context].mkdir(exist_ok=True)
        options = dict(session_options[context]) | ({} if alone else {WEIGHTS_OPTION: ".."})
        config = genai_config(model, settings[context], options)
        ir.save(model, folders[context] / MODEL_FILE)
        write_json(folders[context] / "genai_config.json", config)
    return folders


def write_tokenizer(folder: Path, tokenizer: GenaiTokenizer) -> None:
    """Write the files from which GenAI makes its tokenizer."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.tokenizer, ensure_ascii=False), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer.config)


def genai_config(model: ir.Model, settings: GenerationSettings, session_options: Mapping[str, str]) -> dict[str, Any]:
    """The content of genai_config.json; `settings` need a token that ends texts. Without heads there is no cache."""
    graph = model.graph
    names = {value.name or "": value.shape or ir.Shape([]) for value in graph.inputs}
    shapes = {int(found[1]): names[found[0]] for name in names if (found := PAST.fullmatch(name))}
    (vocabulary,) = (value.shape[-1] for value in graph.outputs if value.name == OUTPUT and value.shape is not None)
    length = settings.context_length or UNLIMITED
    return {
        "model": {
            "type": "decoder",
            "vocab_size": vocabulary,
            "context_length": length,
            **({"bos_token_id": settings.leading[0]} if settings.leading else {}),
            "eos_token_id": list(settings.end),
            "pad_token_id": settings.end[0],
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **session_options},
                # GenAI reads each layer's own heads from the graph; these are the largest.
                "head_size": _largest(shapes, -1),
                "num_key_value_heads": _largest(shapes, HEADS),
                "num_hidden_layers": max(shapes, default=0) + 1,
                "inputs": {
                    **{name: name for name in (INPUT, MASK, POSITIONS) if name in names},
                    "past_key_names": past_name("%d", "key"),
                    "past_value_names": past_name("%d", "value"),
                },
                "outputs": {
                    OUTPUT: OUTPUT,
                    "present_key_names": present_name("%d", "key"),
                    "present_value_names": present_name("%d", "value"),
                },
            },
        },
        "search": {
            "max_length": min(length, DEFAULT_LENGTH),
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": IN_PLACE in model.metadata_props,  # standard operators join past and present
        },
    }


def _largest(shapes: Mapping[int, ir.Shape], axis: int) -> int:
    return max((size for shape in shapes.values() if isinstance(size := shape[axis], int)), default=0)


def share_weights(models: Mapping[str, ir.Model], weights: Path) -> None:
    """Write the tensors of `models` to the file `weights`, equal ones once, and make the graphs refer to it."""
    tensors = {
        context: {
            name: tensor
            for name, value in model.graph.initializers.items()
            if (tensor := value.const_value) is not None
            and (isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > INLINE)
        }
        for context, model in models.items()
    }
    keys = {context: {name: _key(each) for name, each in own.items()} for context, own in tensors.items()}
    makers = {keys[context][name]: each.numpy for context, own in tensors.items() for name, each in own.items()}
    locations = write_weights(weights, makers.items())
    for context, model in models.items():
        refer_to_weights(model, weights, {name: locations[key] for name, key in keys[context].items()})


def _key(tensor: ir.TensorProtocol) -> str:
    """Equal for tensors of the same bytes: where they lie in a file, or their digest."""
    if isinstance(tensor, ir.ExternalTensor):
        return f"{tensor.path} {tensor.offset} {tensor.length}"
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write one of the files that GenAI reads."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
