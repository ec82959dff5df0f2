"""Hugging Face models: from a folder, never from the network, with a forward function of tensors alone.

    ready = load_hugging_face(Path("SmolLM2-135M"))
    module = partition(ready.model, ready.example_inputs, forward=ready.forward, dynamic_shapes=ready.dynamic_shapes)

The model stays unwrapped, so parameters and groups go by its own names. Needs the extra `hf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpcompile.core.errors import UsageError
from cpcompile.files.pointers import require_fetched_model
from cpcompile.partitioning.trace import Forward, reason_of


@dataclass(frozen=True)
class Ready:
    """The arguments of `partition` for one model."""

    model: nn.Module
    forward: Forward
    example_inputs: tuple[Tensor, ...]
    dynamic_shapes: tuple[Any, ...]


def language_model(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    """Logits (batch, sequence, vocabulary)."""
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def text_encoder(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    """Last hidden state (batch, sequence, width)."""
    return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def image_encoder(model: nn.Module, pixel_values: Tensor) -> Any:
    """Last hidden state (batch, patches, width)."""
    return model(pixel_values=pixel_values).last_hidden_state


def load_hugging_face(folder: Path, *, gguf_file: str | None = None) -> Ready:
    """The model in `folder` in single precision: a causal language model where its config names one, else its base."""
    transformers = transformers_package()
    if folder.is_file():
        raise UsageError(f"{folder}: is a file; give the folder that holds it")
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; models are read from disk, never downloaded")
    require_fetched_model(folder)
    settings: dict[str, Any] = {"local_files_only": True} | ({} if gguf_file is None else {"gguf_file": gguf_file})
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **settings)
        names = tuple(config.architectures or ())
        causal = gguf_file is not None or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        if names and names[0] in ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"):
            loader = getattr(transformers, names[0])
        model = loader.from_pretrained(folder, dtype=torch.float32, **settings)
    except Exception as error:  # of any kind: the model's own code runs
        raise UsageError(
            f"{folder}: cannot be read as a Hugging Face model: {reason_of(error)}; it needs config.json and weights, "
            "or gguf_file"
        ) from error
    return prepare_hugging_face(model)


def prepare_hugging_face(model: Any) -> Ready:
    """Inputs and forward function of a model that is in memory; it is made exportable in place."""
    transformers = transformers_package()
    model.eval()
    config = model.config
    batch = torch.export.Dim("batch")
    if config.model_type in ("t5", "mt5", "umt5"):
        # sdpa with a position bias gives strides that torch.onnx cannot decompose (torch 2.13).
        model.set_attn_implementation("eager")
    if hasattr(config, "num_experts_per_tok"):
        # The others loop over the experts that are hit, or sort tokens by expert, which torch.onnx cannot export.
        model.set_experts_implementation("batched_mm")
    _apply_conv1d_without_views(model)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        example = torch.zeros(2, getattr(config, "num_channels", 3), height, width)
        return Ready(model, image_encoder, (example,), ({0: batch},))
    # The encoder of a T5 has the config of the whole.
    two = getattr(config, "is_encoder_decoder", False) and not type(model).__name__.endswith("EncoderModel")
    if model.main_input_name != "input_ids" or two:
        inputs = "inputs of an encoder and a decoder" if model.main_input_name == "input_ids" else model.main_input_name
        raise UsageError(
            f"{type(model).__name__}: takes {inputs}, not only input_ids or pixel_values; call cpcompile.partition "
            "with example inputs and a forward function of its own"
        )
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    bounded = isinstance(longest, int) and longest > 1  # XLNet has -1 for "any"
    sequence = torch.export.Dim("sequence", max=longest) if bounded else torch.export.Dim("sequence")
    ids = torch.zeros((2, 8), dtype=torch.int64)
    causal = type(model).__name__ in (
        *transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    )
    axes = {0: batch, 1: sequence}
    return Ready(model, language_model if causal else text_encoder, (ids, torch.ones_like(ids)), (axes, axes))


def _apply_conv1d_without_views(model: nn.Module) -> None:
    """GPT-2's Conv1D flattens batch and sequence, which hides their lengths from the graph; a product does not."""
    from transformers.pytorch_utils import Conv1D

    class Product(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, self.weight) + self.bias

    for module in model.modules():
        if type(module) is Conv1D:
            module.__class__ = Product


def transformers_package() -> Any:
    """The package transformers; UsageError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError("Hugging Face models need transformers: pip install 'cpcompile[hf]'") from error
    return transformers
