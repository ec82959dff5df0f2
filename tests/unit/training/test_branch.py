"""Recalibration of a model whose forward pass computes all units, closed ones too: a pretrained one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from cpcompile.core.config import PretrainedConfig, TrainConfig
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.text.corpus import Corpus, TokenFile
from cpcompile.training.branch import Branch, BranchState

VOCABULARY = 32
CONTEXTS = ("a", "b")


def random_corpus() -> Corpus:
    """Each context has tokens of its own, so that its gradients differ from the other's."""
    generator = np.random.default_rng(0)
    files = {
        context: TokenFile(generator.integers(16 * index, 16 * (index + 1), size=400).astype(np.uint16), documents=1)
        for index, context in enumerate(CONTEXTS)
    }
    return Corpus(
        CONTEXTS, tokenizer=Tokenizer(BPE()).to_str(), vocabulary=VOCABULARY, train=files, held_out=files, digests={}
    )


def test_gates_of_a_pretrained_model_that_recalibration_closes_stay_closed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")
    from cpcompile.partitioning.pretrained import PretrainedDecoder

    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
        )
    )
    settings = json.loads(llama.config.to_json_string(use_diff=False))
    model = PretrainedDecoder(PretrainedConfig(settings=settings), contexts=2, model=llama)
    kept = {units.kind: np.zeros((2, units.layers, units.count), dtype=np.bool_) for units in model.units()}
    for table in kept.values():
        quarter = table.shape[2] // 4
        table[0, :, :quarter] = table[1, :, quarter : 2 * quarter] = True
    selection = Selection(CONTEXTS, kept)
    model.select(selection)
    importance = {kind: np.zeros(table.shape) for kind, table in kept.items()}
    state = BranchState(model=model, moments={}, selection=selection, importance=importance)
    config = TrainConfig(
        sequence=8, batch=2, steps=12, importance_sequences=4, recalibrations=2, swap_fraction=0.5, held_out_tokens=64
    )
    state = Branch(name="partition", state=state, first=0, last=12, recalibrate=True).train(
        random_corpus(), config, tmp_path
    )

    assert state.selection is not None
    assert not np.array_equal(state.selection.kept[UnitKind.FFN], kept[UnitKind.FFN]), "no unit was swapped"
    for kind, table in state.selection.kept.items():
        for layer, gate in enumerate(model.gates(kind)):
            assert np.array_equal(gate.table.detach().numpy() != 0, table[:, layer])
    for name, parameter in model.named_parameters():
        if name.startswith("group_gates."):
            for moment in ("exp_avg", "exp_avg_sq"):
                assert state.moments[name][moment][parameter == 0].abs().max() == 0
                assert state.moments[name][moment].abs().max() > 0
