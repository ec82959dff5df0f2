"""The folder of a run that has not ended: for one process, and for the settings and data that it was begun with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.version import __version__
from cpcompile.files.whole_files import only_process, whole_file
from cpcompile.text.corpus import Corpus


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON holds them."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return settings


def run_identity(
    corpus: Corpus,
    model_config: ModelConfig | PretrainedConfig,
    config: TrainConfig,
    pretrained: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """Everything that determines the outcome of a run, in plain containers."""
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "model": dataclasses.asdict(model_config),
                "train": {k: v for k, v in plain_settings(config).items() if k not in ("snapshot_seconds", "controls")},
                "data": dict(corpus.digests),
                "tokenizer": digest_of(corpus.tokenizer),
                "pretrained": _digest_of_weights(pretrained) if pretrained is not None else None,
                "versions": {"cpcompile": __version__, "torch": torch.__version__},
                "threads": torch.get_num_threads(),
            }
        )
    )
    return plain


def digest_of(plain: object) -> str:
    """The digest of plain containers."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _digest_of_weights(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def work_folder(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """The run's folder: new, or that of the interrupted run with the same settings and data; removed at the end."""
    if resume and not folder.exists():
        raise UsageError(f"{folder}: there is no interrupted run to go on with; leave --resume out")
    with only_process(folder / "lock", f"{folder}: another process is training there; wait for it, or stop it"):
        record = folder / "run.json"
        if any(path.name != "lock" for path in folder.iterdir()):
            if not resume:
                raise UsageError(
                    f"{folder}: an interrupted run is there; go on with --resume, or delete that folder to start anew"
                )
            _require_same(record, identity)
        else:
            with whole_file(record) as temporary:
                temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        yield folder
    shutil.rmtree(folder)


def _require_same(record: Path, identity: Mapping[str, Any]) -> None:
    """UsageError unless the run that wrote `record` had the same settings and data."""
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [
            f"{group} {name}: {then.get(name)!s:.60} then, {now.get(name)!s:.60} now".strip()
            for group, now, then in ((key, _table(identity[key]), _table(before.get(key))) for key in identity)
            for name in sorted(now.keys() | then.keys())
            if now.get(name) != then.get(name)
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{record}: cannot be read ({error}); delete {record.parent} to start anew") from error
    if changed:
        raise UsageError(
            f"{record.parent}: the interrupted run had other settings ({'; '.join(changed)}); "
            "resume with the same ones, or delete the folder to start anew"
        )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}
