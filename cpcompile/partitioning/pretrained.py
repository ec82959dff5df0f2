"""A pretrained Hugging Face causal language model as a `LanguageModel`: its own names, gates on what `partition` finds.

    read_pretrained(folder) -> PretrainedConfig, state, tokenizer         from a folder or a GGUF file in it, no network
    PretrainedDecoder(config, contexts=3)                                  the same model, gated

Forward passes have no attention mask: sequences are full, and in a causal model padding on the right does not affect
the tokens before it. The model stays in evaluation mode: without dropout, steps are repeatable.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cpcompile.core.cache import LayerCache
from cpcompile.core.config import PretrainedConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind, Units
from cpcompile.models.gates import Gate
from cpcompile.models.language_model import Kept, KeysValues, LanguageModel, Rows, last, partition_order, visible
from cpcompile.models.shared_state import share_state, without_weights
from cpcompile.partitioning.groups import Group
from cpcompile.partitioning.hugging_face import (
    language_model,
    load_hugging_face,
    prepare_hugging_face,
    transformers_package,
)
from cpcompile.partitioning.partitioned_module import PartitionedModule
from cpcompile.partitioning.partitioner import partition
from cpcompile.partitioning.trace import reason_of

GATES = "group_gates."
SLIDING = "sliding_attention"
"""The kind of layer that looks at the last tokens only, as transformers names it."""
NOT_THE_MODEL = ("transformers_version", "quantization_config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained model as read from a folder."""

    config: PretrainedConfig
    state: Mapping[str, Tensor]
    tokenizer: str
    """The text of tokenizer.json."""


def read_pretrained(folder: Path) -> Pretrained:
    """The causal language model in `folder`, or in the one GGUF file there; UsageError says what is missing."""
    files = sorted(folder.glob("*.gguf"))
    gguf_file = files[0].name if len(files) == 1 and not (folder / "config.json").exists() else None
    if len(files) > 1 and not (folder / "config.json").exists():
        raise UsageError(f"{folder}: has {len(files)} GGUF files; keep the one that you want in a folder of its own")
    ready = load_hugging_face(folder, gguf_file=gguf_file)
    model: Any = ready.model
    if ready.forward is not language_model or model.get_output_embeddings() is None:
        raise UsageError(f"{folder}: is a {type(model).__name__}; a causal language model is needed")
    _require_causal(model, folder)
    settings = json.loads(model.config.to_json_string(use_diff=False))
    # Its origin and the packing of its weights there are not part of the model.
    settings = {k: v for k, v in settings.items() if not k.startswith("_") and k not in NOT_THE_MODEL}
    if (generation := getattr(model, "generation_config", None)) is not None:  # it may name several ends of a text
        settings["eos_token_id"] = generation.eos_token_id or settings.get("eos_token_id")
    tokenizer, template = _tokenizer(folder, gguf_file)
    config = PretrainedConfig(settings=settings, chat_template=template)
    wrapped = PretrainedDecoder(config, model=model)
    return Pretrained(config=config, state=wrapped.state_dict(), tokenizer=tokenizer)


def _require_causal(model: Any, folder: Path) -> None:
    """UsageError if what the model says of a token depends on those after it."""
    ids = torch.ones((2, 8), dtype=torch.int64)
    ids[1, 4:] = 0
    try:
        with torch.no_grad():
            first, second = _logits(model, ids)[:, :4]
    except Exception as error:  # of any kind: the model's own code runs
        raise UsageError(f"{folder}: {type(model).__name__} cannot run on tokens alone: {reason_of(error)}") from error
    if not torch.allclose(first, second, rtol=0, atol=1e-5 * first.abs().max().item()):
        raise UsageError(
            f"{folder}: {type(model).__name__} looks at the tokens that it predicts; a causal language model is needed "
            "(of a BERT, one with is_decoder)"
        )


def _tokenizer(folder: Path, gguf_file: str | None) -> tuple[str, str | None]:
    """The text of tokenizer.json, and the chat template."""
    with suppress(FileNotFoundError):  # transformers converts other forms
        return (folder / "tokenizer.json").read_text(encoding="utf-8"), _chat_template(folder)
    transformers = transformers_package()
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
        template = tokenizer.chat_template
        return str(tokenizer.backend_tokenizer.to_str()), template if isinstance(template, str) else None
    except Exception as error:  # many kinds of error, from several packages
        raise UsageError(
            f"{folder}: its tokenizer cannot be read ({reason_of(error)}); a tokenizer.json is needed"
        ) from error


def _chat_template(folder: Path) -> str | None:
    """The default template of chat_template.jinja or tokenizer_config.json."""
    with suppress(FileNotFoundError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        named = {each["name"]: each["template"] for each in found} if isinstance(found, list) else {"default": found}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / 'tokenizer_config.json'}: is malformed ({error}); correct or remove it") from error
    return named.get("default")


class PretrainedDecoder(LanguageModel):
    """A causal language model of Hugging Face with gates in front of the consumers of its FFN channels and heads."""

    config: PretrainedConfig

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        contexts: int = 0,
        model: nn.Module | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Around `model`, around the tensors of `state` (gates too, if there are `contexts`), or untrained."""
        super().__init__()
        self.config = config
        self.contexts = contexts
        if model is None:
            with without_weights() if state is not None else nullcontext():
                model = _untrained(config)
        # The children are registered, not the model: parameters keep the model's own names.
        self._unregistered: list[Any] = [model]
        for name, child in model.named_children():
            self.add_module(name, child)
        if any(True for _ in model.parameters(recurse=False)):
            raise UsageError(f"{type(model).__name__}: has parameters outside of its modules; it cannot be partitioned")
        names = {id(tensor): name for name, tensor in reversed(list(self.named_parameters(remove_duplicate=False)))}
        every = dict(self.named_parameters(remove_duplicate=False))
        self._tied = {name: names[id(tensor)] for name, tensor in every.items() if names[id(tensor)] != name}
        layers = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        self._rows = {names[id(tensor)] for layer in layers for tensor in layer.parameters()}
        # A parameter under two names is stored once.
        self.register_state_dict_post_hook(_without_tied)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_tied)  # type: ignore[no-untyped-call]
        if contexts:
            if state is not None:  # partition proves itself on the weights
                share_state(self, {name: tensor for name, tensor in state.items() if not name.startswith(GATES)})
            partitioned = _partition(model, config, contexts)
            self._unregistered.append(partitioned)
            self.group_gates = partitioned.gates
        if state is not None:
            share_state(self, state)
        self.eval()

    @property
    def partitioned(self) -> PartitionedModule:
        """The module behind the gates."""
        return cast(PartitionedModule, self._unregistered[1])

    def train(self, mode: bool = True) -> PretrainedDecoder:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    def forward(
        self,
        input_ids: Tensor,
        context: Tensor | None = None,
        *,
        rows: Rows | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        logits: Tensor
        if rows is not None:
            per_kind = {kind: iter(of_kind) for kind, of_kind in rows.items()}
            in_order = [next(per_kind[group.kind]) for group in self.partitioned.groups]
            logits = self.partitioned.with_rows(input_ids, rows=in_order)
        elif context is not None:
            logits = self.partitioned(input_ids, context=context)
        elif self.contexts:
            ones = [torch.ones(group.units) for group in self.partitioned.groups]
            logits = self.partitioned.with_rows(input_ids, rows=ones)
        else:
            logits = _logits(self._unregistered[0], input_ids)
        return logits

    @cached_property
    def _caches(self) -> Sequence[LayerCache] | None:
        ids = torch.zeros((1, 2), dtype=torch.int64)
        try:
            with torch.no_grad():
                if not self.contexts:
                    return _layer_caches(self._unregistered[0], ids)
                ones = [torch.ones(group.units) for group in self.partitioned.groups]
                found: Sequence[LayerCache] | None = self.partitioned.with_rows(ids, rows=ones, forward=_layer_caches)
                return found
        except Exception:  # of any kind: the model's own code runs, and many have no cache
            return None

    def caches(self) -> Sequence[LayerCache] | None:
        return self._caches

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        past: Sequence[KeysValues],
        context: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[KeysValues]]:
        inputs = (input_ids, attention_mask, position_ids, logits_to_keep, past)
        decoded: tuple[Tensor, Sequence[KeysValues]]
        if context is None:
            decoded = _decode(self._unregistered[0], *inputs)
        else:
            rows = [gate.row(context) for gate in self.partitioned.group_gates]
            decoded = self.partitioned.with_rows(*inputs, rows=rows, forward=_decode)
        return decoded

    def units(self) -> tuple[Units, ...]:
        return self.partitioned.units()

    def gates(self, kind: UnitKind) -> Sequence[Gate]:
        return [self.partitioned.group_gates[index] for index in self.partitioned.of_kind(kind)]

    def kept(self, selection: Selection, context: str) -> None:
        return None

    def kept_sizes(self, selection: Selection, context: str) -> dict[str, int]:
        return self.partitioned.kept_sizes(selection, context)

    def parameter_kind(self, name: str) -> UnitKind | None:
        if name in self._rows:
            return UnitKind.VOCABULARY
        return self.partitioned.parameter_kind(name)

    def sort_units(self, selection: Selection) -> Selection:
        kept = {kind: table.copy() for kind, table in selection.kept.items()}
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for kind, table in kept.items():
                for layer, index in enumerate(self.partitioned.of_kind(kind)):
                    group, gate = self.partitioned.groups[index], self.partitioned.group_gates[index]
                    order = partition_order(table[:, layer])
                    table[:, layer] = table[:, layer, order]
                    gate.table.copy_(gate.table[:, torch.from_numpy(order)])
                    _reorder(parameters, group, order)
        return Selection(selection.contexts, kept)


def _reorder(parameters: Mapping[str, Tensor], group: Group, order: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Move the positions of unit order[i] to those of unit i, in every parameter."""
    for name, axes in group.parameters.items():
        for axis, unit_of_position in enumerate(axes):
            if unit_of_position is None:
                continue
            places = [np.flatnonzero(unit_of_position == unit) for unit in range(group.units)]
            positions = np.arange(len(unit_of_position))
            for unit, source in enumerate(order):
                positions[places[unit]] = places[source]
            parameter = parameters[name]
            parameter.copy_(parameter.index_select(axis, torch.from_numpy(positions)))


def _untrained(config: PretrainedConfig) -> nn.Module:
    transformers = transformers_package()
    settings = dict(config.settings)
    try:
        made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UsageError(
            f"transformers {transformers.__version__} cannot make a {config.settings['model_type']} of these "
            f"settings: {reason_of(error)}"
        ) from error
    prepare_hugging_face(model)
    return model


def _partition(model: nn.Module, config: PretrainedConfig, contexts: int) -> PartitionedModule:
    # Traced at one size: the groups are the same for every size, and symbolic sizes would double the time.
    example = prepare_hugging_face(model).example_inputs[:1]
    partitioned = partition(model, example, contexts=contexts, forward=_logits, align=config.align)
    for units in partitioned.units():
        if not partitioned.exists(units.kind).all():
            raise UsageError(f"{type(model).__name__}: its layers have different numbers of {units.kind} units")
    return partitioned


def _logits(model: nn.Module, input_ids: Tensor) -> Any:
    return model(input_ids=input_ids, use_cache=False).logits


def _layer_caches(model: Any, input_ids: Tensor) -> Sequence[LayerCache] | None:
    """The cache of every layer; None if the model has another kind of state."""
    cache = model(input_ids=input_ids, use_cache=True).past_key_values
    shapes = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
    tokens = input_ids.shape[1]
    if not shapes or any(len(key) != 4 or key != value or key[2] != tokens for key, value in shapes):
        return None
    return [LayerCache(heads=key[1], head_dim=key[3]) for key, _ in shapes]


def _decode(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    logits_to_keep: Tensor,
    past: Sequence[KeysValues],
) -> tuple[Tensor, Sequence[KeysValues]]:
    """`LanguageModel.decode` of a model of transformers; its masks are ours, with the window of each kind of layer."""
    cache = transformers_package().DynamicCache()
    for layer, (key, value) in enumerate(past):
        cache.update(key, value, layer)
    everything = visible(attention_mask, input_ids.shape[1])
    window: int = getattr(model.config, "sliding_window", None) or 0  # 0 for none
    kinds = dict.fromkeys(getattr(model.config, "layer_types", None) or [SLIDING if window else "full_attention"])
    masks = {kind: _within(everything, window) if kind == SLIDING else everything for kind in kinds}
    output = model(
        input_ids=input_ids,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last(logits_to_keep),
    )
    return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def _within(visible_tokens: Tensor, window: int) -> Tensor:
    """Of the tokens that each token looks at, the last `window`."""
    sequence, total = visible_tokens.shape[-2:]
    own = torch.arange(sequence)[:, None] + (total - sequence)
    return visible_tokens & (torch.arange(total) > own - window)


def _without_tied(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for name in cast(PretrainedDecoder, module)._tied:
        state.pop(prefix + name, None)


def _with_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, first in cast(PretrainedDecoder, module)._tied.items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]
