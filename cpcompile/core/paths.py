"""Where the files of a model lie."""

from __future__ import annotations

from pathlib import Path


def dense_path(out: Path) -> Path:
    """The path of the dense baseline of the checkpoint `out`: model.pt -> model.dense.pt."""
    return out.with_name(f"{out.stem}.dense{out.suffix}")


def calibration_path(model: Path) -> Path:
    """The path of the calibration of the checkpoint `model`: model.pt -> model.calibration.pt."""
    return model.with_name(f"{model.stem}.calibration{model.suffix}")
