"""Open, verify, load and run changed bundles: each works or is refused with a sentence.

    python -m tests.fuzz.fuzz_bundle --minutes 5 [--seed 0]

A case changes bytes of any file, or values of the JSON files, and mostly makes all digests fit again. A pipe is beside
the bundle, and a process that opens it hangs. A finding is printed with its seed: `--seed SEED --cases 1` repeats it.
Exit code 1 if there is any.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpcompile.bundle.reader import open_bundle
from cpcompile.core.errors import CpcompileError
from cpcompile.runtime.engine import load_engine
from tests.bundles import reseal
from tests.fuzz.batches import main, print_tally
from tests.unit.bundle.test_hostile_bundle import SECRET, write_bundle

MODULE = "tests.fuzz.fuzz_bundle"
CASES_PER_PROCESS = 250
SECONDS_PER_PROCESS = 60
MEMORY = 8 << 30
SECRET_NAME = "secret.bin"
HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10 << 30, 2**64, [], {}, [[1]], ["a"], {"a": "a"}, "", "a", "..", "\0", "\ud800"),
    *(f"../../../{SECRET_NAME}", f"../{SECRET_NAME}", f"/proc/self/cwd/{SECRET_NAME}", "/dev/zero", "x" * 300),
)
NEEDLES = (b"weights.bin", b"location", b"offset", b"length", b"Add", b"logits", b"a", b"x", b"w")
SPLICES = (b"../../../secret.bin", b"/dev/zero", b"-1", b"99999999999", b"\xff" * 10, b"", b"*/_ORT_MEM_ADDR_/*", b"If")


def change_bytes(data: bytearray, rng: random.Random) -> bytearray:
    """One to four changes of a file's bytes."""
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randint(0, len(data)) for _ in range(2))
        match rng.randrange(6):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : min(end, at + 8)]
            case 3:
                data[at:at] = data[at : min(end, at + 64)]
            case 4:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case _:
                old, new = rng.choice(NEEDLES), rng.choice(SPLICES)
                if (found := data.find(old, at)) >= 0:
                    # A length before the text is made to fit, so that the change is read.
                    if rng.random() < 0.7 and found and data[found - 1] == len(old) and len(new) < 128:
                        data[found - 1] = len(new)
                    data[found : found + len(old)] = new
    return data


def change_json(tree: Any, rng: random.Random) -> None:
    """Replace, remove or rename something in nested containers."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    match rng.randrange(3):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(rng.choice(HOSTILE))] = node.pop(key)
        case _:
            node[key] = rng.choice(HOSTILE)


def change_bundle(bundle: Path, rng: random.Random) -> None:
    """One changed file; the digests fit again in three cases of four."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    path = rng.choice(files)
    fits = rng.random() < 0.75
    if path.suffix == ".json" and path.stat().st_size > 2 and rng.random() < 0.8:
        content = json.loads(path.read_text())
        if path.name == "manifest.json" and fits:
            reseal(bundle, lambda manifest: change_json(manifest, rng))
            return
        change_json(content, rng)
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(change_bytes(bytearray(path.read_bytes()), rng))
    if fits and path.name != "manifest.json":
        reseal(bundle)


def use(bundle: Path) -> None:
    """All that a reader of bundles does; CpcompileError where the bundle or the engine is refused."""
    opened = open_bundle(bundle)
    opened.verify_all()
    for context in opened.contexts:
        opened.tokenizer(context)
        opened.token_ids(context)
        for variant in opened.variants(context):
            engine = load_engine(opened, context, variant.name, threads=1)
            variant.graph()
            inputs = [(i.name, i.type, i.shape) for i in engine.session.get_inputs()]
            if inputs == [("x", "tensor(float)", [4])]:
                engine.outputs({"x": SECRET})


def run_cases(first: int, count: int) -> None:
    """The cases of one process; a line per case before it begins, so that the last one is that of a crash."""
    warnings.simplefilter("ignore")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tally = Counter(refused=0, worked=0)
    with tempfile.TemporaryDirectory(prefix="fuzz-bundle-") as folder:
        original = write_bundle(Path(folder) / "original.cpc")
        os.mkfifo(Path(folder) / SECRET_NAME)
        os.chdir(folder)
        for seed in range(first, first + count):
            print(f"case {seed}", flush=True)
            bundle = Path(folder) / "model.cpc"
            shutil.copytree(original, bundle)
            try:
                with suppress(
                    KeyError, TypeError, AttributeError, ValueError, IndexError
                ):  # no digest can be made to fit: it is left as it is
                    change_bundle(bundle, random.Random(seed))
                use(bundle)
                tally["worked"] += 1
            except CpcompileError as error:
                tally["refused"] += 1
                if not str(error).strip() or len(str(error)) > 4000:
                    print(f"FINDING {seed}: no sentence: {error}", flush=True)
            except BaseException:
                print(f"FINDING {seed}: {traceback.format_exc()}", flush=True)
            shutil.rmtree(bundle)
    print_tally(tally)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, MODULE, run_cases, CASES_PER_PROCESS, SECONDS_PER_PROCESS))
