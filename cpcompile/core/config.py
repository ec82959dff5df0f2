"""Every setting with its default.

The command line, the TOML file and the library all fill the same keyword-only dataclasses;
each validates itself on construction and says how to correct a wrong value.

    preset -> ModelConfig
    TOML [model], [train] < flags -> TrainConfig
    TOML [validate] < flags -> ValidateConfig
    TOML [check] < flags -> CheckConfig, in `check_config`
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpcompile.core import controls
from cpcompile.core.coercion import LARGEST as LARGEST
from cpcompile.core.coercion import coerce_fields, require, require_range
from cpcompile.core.errors import UsageError

CONTEXT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
RESERVED_NAMES = ("router", "shared_assets", "manifest.json", "report.json", "report.html")
"""Files and folders of a bundle that are not contexts."""
OPSETS = (20, 23)
"""With opset 23 attention and RMSNorm are single operators; 20 spells them out."""

RECOVERIES = ("none", "least-squares")
CONTROLS = tuple(controls.CONTROLS)
"""Names of the controls, which `cpcompile.core.controls` explains."""
ROUNDED = ("int8", "int7", "int8-weights", "int4-weights")
"""Precisions of engines whose weights are rounded, see `cpcompile.core.rounding`."""
STANDARD_ROUNDED = ("int8", "int7")
"""Those of them that operators of the standard compute."""
SEARCH_SECONDS = 600.0
"""After how long a search for the fastest engine tries no more mixtures of precisions, unless told otherwise."""
MIXED = "mixed"
"""The precision of an engine whose parameters are rounded in different ways."""
DENSE_PEER = "onnx-dense"
PEERS = (DENSE_PEER, "torch-compile", "onnx-dynamic", "openvino")
"""What an engine can be timed with, which `cpcompile.validation.peers` explains."""


def require_context_name(name: object, where: str) -> None:
    """Raise UsageError unless `name` can be the name of a context, and so of a folder in a bundle."""
    require(
        isinstance(name, str) and CONTEXT_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES,
        f"{where}: {name!r} cannot name a context; a name has lower-case letters, digits, and . _ - after the first, "
        f"at most 100 characters, and is none of {', '.join(RESERVED_NAMES)}; rename it",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder (`cpcompile.models.decoder`)."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    ffn: int = 1024
    align: int = 32
    """Channels of one FFN unit; 32 fills the vector registers and tiles of the engines."""
    tied: bool = True
    """Embedding and output head share their weights."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        coerce_fields(self, "model")
        sizes = "vocabulary width layers heads kv_heads ffn align"
        require_range(self, "model", sizes, lambda size: size >= 1, "has to be at least 1")
        require_range(self, "model", "rope_base norm_eps", lambda value: value > 0, "has to be positive")
        require(self.width % self.heads == 0, f"model.width {self.width} is not a multiple of heads {self.heads}")
        require(self.head_dim % 2 == 0, f"model: head_dim {self.head_dim} is odd; rotary positions need pairs")
        require(
            self.heads % self.kv_heads == 0, f"model.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"
        )
        require(self.ffn % self.align == 0, f"model.ffn {self.ffn} is not a multiple of align {self.align}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """A Hugging Face causal language model (`cpcompile.partitioning.pretrained`)."""

    settings: Mapping[str, Any]
    """Its config.json."""
    align: int = 1
    """Channels of one FFN unit: 1, because neighbouring channels of a pretrained model have nothing in common; units
    are reordered so that partitions are contiguous."""
    chat_template: str | None = None
    """The Jinja template that makes a prompt of messages, if its tokenizer has one."""

    def __post_init__(self) -> None:
        require(isinstance(self.settings, dict), "pretrained.settings: the content of a config.json is needed")
        for name in ("model_type", "vocab_size"):
            require(name in self.settings, f"pretrained.settings: {name} is missing")
        require(
            type(self.vocabulary) is int and self.vocabulary > 0,
            "pretrained.settings: vocab_size is not a positive integer",
        )
        template = self.chat_template
        require(template is None or isinstance(template, str), "pretrained.chat_template: is no text")
        require(type(self.align) is int and self.align >= 1, f"pretrained.align is {self.align}: at least 1 is needed")

    @property
    def vocabulary(self) -> int:
        size: int = self.settings["vocab_size"]
        return size


PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType(
    {
        "nano": ModelConfig(vocabulary=512, width=64, layers=2, heads=4, kv_heads=2, ffn=256, align=16),
        "tiny": ModelConfig(vocabulary=2048, width=192, layers=4, heads=6, kv_heads=6, ffn=768),
        "small": ModelConfig(vocabulary=8192, width=512, layers=6, heads=8, kv_heads=4, ffn=2048),
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a partitioned model is trained (`cpcompile.training`). Steps count optimiser updates."""

    seed: int = 0
    sequence: int = 128
    """Tokens per training sequence."""
    batch: int = 4
    """Sequences per context in one step; a step has one batch of every context."""
    steps: int = 1000
    """Updates of the whole schedule: dense phase and partition phase together."""
    dense_fraction: float = 0.25
    """Part of `steps` that trains the dense parent, from which all branches start; 0 for a pretrained one. It is small
    because masked steps are cheaper and specialisation takes training: at one half the demo's model loses 3.7 %, at a
    quarter nothing."""
    learning_rate: float = 2e-3
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.3
    weight_decay: float = 0.1
    clip: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    budgets: Mapping[str, float] = field(default_factory=lambda: {"ffn": 0.25, "head": 0.5})
    """Fraction of the units of a kind that each context keeps; kinds absent from the model are ignored."""
    core_fractions: Mapping[str, float] = field(default_factory=lambda: {"ffn": 0.5, "head": 0.5})
    """Part of the budget of a kind that all contexts share. Shorter training calls for more sharing, because each
    context trains its own units alone."""
    specificity: float = 0.5
    """How much a context prefers units that the others need less: 0 uses importance alone, -1 makes one choice for all.
    Above 0 the contexts' own units are disjoint, best if they are trained; without training, sharing is best."""
    floor: float = 0.5
    """Every layer keeps at least this part of an even share of the budget."""
    importance_sequences: int = 32
    """Sequences per context on which importance is measured."""
    distill: float = 0.5
    """Weight of the KL divergence to the dense baseline; the cross-entropy has the remaining weight."""
    teacher_top: int = 32
    """Logits of the dense baseline that are cached per token."""
    recalibrations: int = 4
    """How often units are swapped during the partition phase."""
    swap_fraction: float = 0.1
    """Part of a context's own units that the first recalibration may swap; it decays to 0."""
    recalibrate_until: float = 0.65
    """Part of the partition phase after which the selection no longer changes."""
    held_out_fraction: float = 0.05
    """Part of the documents that is never trained on."""
    held_out_tokens: int = 16384
    """Held-out tokens per context for evaluation, and in the checkpoint."""
    recover: str = "none"
    """How removed units are compensated for before training: see RECOVERIES."""
    recover_sequences: int = 64
    """Sequences per context for the least-squares fit."""
    snapshot_seconds: float = 30.0
    """Seconds of work that an interruption may cost."""
    controls: tuple[str, ...] = ()
    """Extra branches to train and compare with; see CONTROLS."""

    def __post_init__(self) -> None:
        coerce_fields(self, "train")
        counts = "sequence batch importance_sequences recover_sequences teacher_top held_out_tokens"
        require_range(self, "train", counts, lambda count: count >= 1, "has to be at least 1")
        positive = "learning_rate clip snapshot_seconds"
        require_range(self, "train", positive, lambda value: value > 0, "has to be positive")
        require(
            0 < self.held_out_fraction < 1,
            f"train.held_out_fraction is {self.held_out_fraction}: it has to be between 0 and 1",
        )
        parts = "dense_fraction warmup_fraction decay_fraction floor distill swap_fraction recalibrate_until"
        require_range(self, "train", parts, lambda part: 0 <= part <= 1, "has to be from 0 to 1")
        natural = "seed recalibrations weight_decay steps"
        require_range(self, "train", natural, lambda value: value >= 0, "cannot be negative")
        require(
            self.steps >= 2 or self.dense_fraction == 0,
            f"train.steps is {self.steps}: at least one dense step and one partition step are needed",
        )
        for kind, budget in self.budgets.items():
            kinds = ("ffn", "head", "expert")
            require(kind in kinds, f"train.budgets: {kind!r} is none of the kinds {', '.join(kinds)}")
            require(0 < budget <= 1, f"train.budgets: {kind} = {budget}; a budget is above 0 and at most 1")
        require({"ffn", "head"} <= set(self.budgets), "train.budgets: name both ffn and head; 1.0 keeps all")
        require(
            self.core_fractions.keys() == self.budgets.keys(),
            "train.core_fractions: name the same kinds as train.budgets",
        )
        for kind, fraction in self.core_fractions.items():
            require(0 <= fraction <= 1, f"train.core_fractions: {kind} = {fraction}; it has to be from 0 to 1")
        require(-1 <= self.specificity <= 1, f"train.specificity is {self.specificity}: it has to be from -1 to 1")
        require(self.recover in RECOVERIES, f"train.recover: {self.recover!r} is none of {', '.join(RECOVERIES)}")
        for control in self.controls:
            require(control in CONTROLS, f"train.controls: {control!r} is none of {', '.join(CONTROLS)}")

    @property
    def dense_steps(self) -> int:
        if self.dense_fraction == 0:
            return 0
        return min(max(1, round(self.steps * self.dense_fraction)), self.steps - 1)


PRETRAINED_TRAIN = TrainConfig(
    steps=200,
    batch=2,
    dense_fraction=0.0,
    learning_rate=1e-4,
    budgets={"ffn": 0.5, "head": 0.75, "expert": 0.5},
    core_fractions={"ffn": 0.5, "head": 0.5, "expert": 0.5},
    specificity=-0.5,
    importance_sequences=64,
    held_out_tokens=4096,
    recalibrations=0,
    snapshot_seconds=300.0,
)
"""How a pretrained model is partitioned and trained further: no dense phase, small steps, mostly shared units."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Contents of a bundle (`cpcompile build`)."""

    contexts: tuple[str, ...] | None = None
    """The contexts to build; None builds all that the model has."""
    opset: int = OPSETS[-1]
    standalone: bool = False
    """Whether every engine has its weights in its own file instead of sharing one."""
    standard_operators: bool = False
    """Whether engines keep to the operators of the ONNX standard, for other runtimes than ONNX Runtime."""
    merged: bool = False
    """Whether to add one engine for all contexts, with the context as an input."""
    vocabulary_coverage: float | None = None
    """The part of a context's text that the kept tokens of its vocabulary cover; None keeps every token."""
    targets: tuple[str, ...] = ()
    """Engines to add, as `cpcompile.targets.requests.parse_targets` reads them."""
    precisions: tuple[str, ...] | None = None
    """Precisions of the added engines; None is the default of the targets."""
    profiles: tuple[str, ...] = ()
    """Ranges of axis lengths that the added engines accept, AXIS=MIN:OPT:MAX."""
    validate: bool = True
    """Whether the engines are compared with the eager model; without, the report says that they were not."""
    search_seconds: float | None = None
    """After how long `--target best` tries no more mixtures of precisions; None: after SEARCH_SECONDS."""

    def __post_init__(self) -> None:
        coerce_fields(self, "build")
        require(self.opset in OPSETS, f"build.opset is {self.opset}: it has to be one of {', '.join(map(str, OPSETS))}")
        require(
            self.vocabulary_coverage is None or 0 < self.vocabulary_coverage <= 1,
            f"build.vocabulary_coverage is {self.vocabulary_coverage}: it has to be above 0 and at most 1",
        )
        require(
            not (self.merged and self.standalone),
            "--merged is one engine whose weights all contexts share; leave out --standalone",
        )
        require_range(self, "build", "search_seconds", lambda value: value is None or value > 0, "has to be positive")
        blocks = [each for each in self.precisions or () if each in set(ROUNDED) - set(STANDARD_ROUNDED)]
        require(
            not (self.standard_operators and blocks and {"cpu", "best"} & set(self.targets)),
            f"--precision {', '.join(blocks)} needs operators of ONNX Runtime; leave out --standard-operators",
        )
        require(
            not self.merged or self.vocabulary_coverage is None,
            "--merged is one engine for all contexts, which share one vocabulary; leave out --vocabulary-coverage",
        )

    def require_compatible(self, contexts: Sequence[str]) -> None:
        """Raise UsageError if these settings do not fit the `contexts` of the model."""
        require(
            not self.merged or len(contexts) > 1,
            f"--merged joins several contexts, but there is only {contexts[0]}; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """How a bundle is compared with the eager model (`cpcompile.validation`)."""

    tolerance_multiple: float = 8.0
    """Allowed engine error, as a multiple of the eager model's own float32 error against float64."""
    shapes: tuple[tuple[int, int], ...] = ((1, 1), (1, 16), (1, 128), (4, 32))
    """(batch, sequence) of the parity checks."""
    speed_shapes: tuple[tuple[int, int], ...] = ((1, 128), (1, 1), (4, 128))
    """(batch, sequence) of the timings."""
    rounds: int = 60
    """Interleaved timing rounds of engine and eager model."""
    threads: int = 0
    """Threads of engine and eager model; 0 takes all cores."""
    jobs: int = 1
    """How many contexts are compared with the eager model at once, each in its own process; timings follow."""
    peers: tuple[str, ...] = (DENSE_PEER,)
    """Peers that are timed along with the engines; `("all",)` takes all of PEERS, `("none",)` or `()` none."""
    memory: bool = True
    """Whether memory is measured, in processes of its own."""
    speed: bool = True
    """Whether the engines are timed."""
    coherence: bool = True
    """Whether text is generated to measure whether it stays on topic."""
    layers: bool = True
    """Whether the errors of single layers are measured if parity passes; if it fails they always are."""
    min_speed_ratio: float = 0.0
    """Minimum speedup of every engine over the eager dense model at every shape; 0 means no minimum."""
    max_perplexity_increase: float = 0.01
    """Part by which the mean perplexity over the contexts may exceed that of the dense baseline."""

    def __post_init__(self) -> None:
        coerce_fields(self, "validate")
        peers = tuple(dict.fromkeys(self.peers))
        peers = PEERS if peers == ("all",) else () if peers == ("none",) else peers
        object.__setattr__(self, "peers", peers)
        for peer in peers:
            require(peer in PEERS, f"there is no peer {peer!r}; there are {', '.join(PEERS)}, or 'all' or 'none' alone")
        for name in ("shapes", "speed_shapes"):
            shapes = getattr(self, name)
            require(
                bool(shapes) and all(length >= 1 for shape in shapes for length in shape),
                f"validate.{name} is {shapes}: pairs of batch and sequence are needed, each at least 1",
            )
        require_range(self, "validate", "tolerance_multiple", lambda value: value > 0, "has to be positive")
        require(self.jobs >= 1, f"validate.jobs is {self.jobs}: at least 1 is needed")
        require(self.rounds >= 2, f"validate.rounds is {self.rounds}: an interval needs at least 2")
        natural = "threads min_speed_ratio max_perplexity_increase"
        require_range(self, "validate", natural, lambda value: value >= 0, "cannot be negative")
        require(
            self.speed or not self.min_speed_ratio,
            f"validate.min_speed_ratio is {self.min_speed_ratio}, but speed is not measured: leave one of them out",
        )


def preset(name: str) -> ModelConfig:
    """The model configuration called `name`; UsageError lists the names that exist."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    return PRESETS[name]
