from pathlib import Path

import torch
from torch.nn import functional as F

from cpcompile.core.config import preset
from cpcompile.models.decoder import Decoder
from cpcompile.training.teacher import Teacher, divergence


def make(folder: Path, top: int = 8) -> Teacher:
    torch.manual_seed(0)
    return Teacher(Decoder(preset("nano")).eval(), folder, steps=range(5, 8), contexts=2, tokens=12, top=top)


def test_targets_are_the_best_log_probabilities(tmp_path: Path) -> None:
    teacher = make(tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    best, values = teacher.targets(6, 1, ids)
    with torch.no_grad():
        expected = teacher.model(ids).flatten(0, 1).log_softmax(-1).topk(8)
    assert torch.equal(best, expected.indices)
    assert torch.allclose(values, expected.values, rtol=0, atol=4e-3), "kept in half precision"


def test_a_second_teacher_reads_what_the_first_computed(tmp_path: Path) -> None:
    ids = torch.arange(12).reshape(2, 6)
    first = make(tmp_path).targets(5, 0, ids)
    again = make(tmp_path)
    again.model = None  # type: ignore[assignment]  # any computation would fail
    second = again.targets(5, 0, ids)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_with_all_classes_the_divergence_is_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(20, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    teacher = torch.randn(20, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    values, ids = teacher.topk(29)
    expected = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    assert abs(divergence(student, ids, values) - expected) < 1e-4


def test_lumping_the_rest_bounds_kl_from_below_and_vanishes_for_equals() -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(20, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    teacher = torch.randn(20, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    values, ids = teacher.topk(5)
    assert 0 < divergence(student, ids, values) < F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    assert abs(divergence(teacher, ids, values)) < 1e-9
