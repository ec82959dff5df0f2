import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cpcompile.bundle.manifest import manifest_digest
from cpcompile.bundle.reader import open_bundle
from cpcompile.bundle.writer import BundleWriter, asset_uri
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files.whole_files import file_digest
from tests import bundles

ARTIFACT = dataclasses.replace(bundles.ARTIFACT, shared_bytes=7)


def write(target: Path, *, content: bytes = b"model", contexts: tuple[str, ...] = ("a", "b")) -> Path:
    """`content` stands for the models: b"model" is protobuf, of a field that ONNX has not."""
    with BundleWriter(target) as writer:
        weights = writer.root / "weights"
        weights.mkdir()
        (weights / "weights.bin").write_bytes(b"weights")
        uri = writer.add_asset(weights)
        tokenizer = writer.root / "tokenizer"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text("{}")
        words = writer.add_asset(tokenizer)
        for context in contexts:
            (writer.folder(context, ARTIFACT.variant) / "model.onnx").write_bytes(content)
            writer.add_variant(context, ARTIFACT, weights=uri)
        counts = {"total": 5, "kept": 3, "removed": 2, "removed_by_kind": {"ffn": 2}, "by_name": {"w": [5, 3]}}
        counts["removed_experts"] = {}
        more = {"shared_weights": True, "parameters": dict.fromkeys(contexts, counts)}
        writer.seal(name="test", metadata={"tokenizers": dict.fromkeys(contexts, words), "checkpoint": "0" * 64} | more)
        return writer.commit()


def test_options_of_a_provider_go_with_its_engine(tmp_path: Path) -> None:
    options = {"use_tf32": "0"}
    with BundleWriter(tmp_path / "model.cpc") as writer:
        provided = dataclasses.replace(
            ARTIFACT, variant="cuda-fp16", provider="CUDAExecutionProvider", provider_options=options
        )
        (writer.folder("a", "cuda-fp16") / "model.onnx").write_bytes(b"model")
        writer.add_variant("a", provided, weights=None)
        counts = {"total": 5, "kept": 3, "removed": 2, "removed_by_kind": {}, "removed_experts": {}}
        more = {"shared_weights": False, "parameters": {"a": counts}, "checkpoint": "0" * 64}
        bundle = writer.seal(name="test", metadata={"tokenizers": {}} | more)
        (variant,) = bundle.variants("a")
    assert (variant.provider, variant.provider_options) == ("CUDAExecutionProvider", options)


@contextmanager
def edited_manifest(bundle: Path) -> Iterator[dict[str, Any]]:
    """The manifest to edit; its digest fits afterwards, as that of somebody who means harm would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    yield manifest
    metadata = manifest["additional_metadata"]
    if isinstance(metadata, dict) and isinstance(metadata.get("cpcompile"), dict):
        metadata["cpcompile"]["manifest_digest"] = manifest_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def put(tree: Any, path: str, value: object) -> None:
    """Set what lies at `path` in nested containers; REMOVE takes it away."""
    *parents, last = path.split("/")
    for key in parents:
        tree = tree[key]
    if value is REMOVE:
        del tree[last]
    else:
        tree[last] = value


REMOVE = object()
GARBAGE = (None, 5, -1.5, "x", [], {}, [[1]], "\0", REMOVE)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write(tmp_path / "model.cpc")


def test_what_was_written_is_read(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.contexts == ("a", "b")
    (variant,) = opened.variants("a")
    assert (variant.name, variant.runtime, variant.bytes) == ("cpu-fp32", "onnxruntime", 5 + 7)
    assert variant.model.read_bytes() == b"model"
    assert variant.weights is not None
    assert (variant.weights / "weights.bin").read_bytes() == b"weights"
    assert opened.tokenizer("a").read_text() == "{}"
    opened.verify_all()


def test_asset_uris_are_those_of_onnxruntime(tmp_path: Path) -> None:
    package = pytest.importorskip("onnxruntime").ModelPackage
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.bin").write_bytes(b"1")
    (tmp_path / "a.txt").write_bytes(b"22")
    assert asset_uri(tmp_path) == package.compute_directory_hash(str(tmp_path))


def test_onnxruntime_opens_the_package_strictly(bundle: Path) -> None:
    package = pytest.importorskip("onnxruntime").ModelPackage.open(str(bundle))
    names = [component["name"] for component in package.get_info()["components"]]
    package.close()
    assert sorted(names) == ["a", "b"]


def test_a_flipped_byte_is_named(bundle: Path) -> None:
    for path in [p for p in bundle.rglob("*") if p.is_file()]:
        original = path.read_bytes()
        for position in (0, len(original) // 2, len(original) - 1):
            damaged = bytearray(original)
            damaged[position] ^= 0x01
            path.write_bytes(bytes(damaged))
            with pytest.raises(UsageError, match=path.name):
                open_bundle(bundle).verify_all()
        path.write_bytes(original)
    open_bundle(bundle).verify_all()


def test_a_missing_file_is_named(bundle: Path) -> None:
    (weights,) = bundle.glob("shared_assets/*/weights.bin")
    weights.unlink()
    opened = open_bundle(bundle)
    with pytest.raises(UsageError, match="weights.bin: is missing"):
        opened.verify(weights.parent)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a bundle"):
        open_bundle(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        open_bundle(tmp_path / "nowhere")


def test_a_bundle_that_failed_is_named_where_there_is_no_other(bundle: Path) -> None:
    bundle.rename(f"{bundle}.failed")
    with pytest.raises(UsageError, match=rf"a build whose verdict is fail wrote {re.escape(str(bundle))}\.failed"):
        open_bundle(bundle)


def test_an_unknown_context_or_variant_lists_what_there_is(bundle: Path) -> None:
    with pytest.raises(UsageError, match="no context 'x'; it has a, b"):
        open_bundle(bundle).variants("x")
    with pytest.raises(UsageError, match="no variant 'gpu'; it has cpu-fp32"):
        open_bundle(bundle).variant("a", "gpu")


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../outside"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, path: str) -> None:
    with edited_manifest(bundle) as manifest:
        manifest["components"]["a"] = path
        manifest["additional_metadata"]["cpcompile"]["files"][f"{path}/component.json"] = "0" * 64
    with pytest.raises(UsageError, match="leaves the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: "REMOVE" if value is REMOVE else repr(value))
@pytest.mark.parametrize(
    "path", ["components", "files", "parameters", "parameters/a", "parameters/a/kept", "shared_weights", "tokenizers/a"]
)
def test_a_manifest_of_other_forms_is_refused(bundle: Path, path: str, value: object) -> None:
    if path == "tokenizers/a" and isinstance(value, str):
        return  # an asset that is not there is found when it is asked for
    if path == "parameters/a/kept" and value == 5:
        return
    with edited_manifest(bundle) as manifest:
        put(manifest if path == "components" else manifest["additional_metadata"]["cpcompile"], path, value)
    with pytest.raises(UsageError, match=r"malformed|no context|is missing") as caught:
        open_bundle(bundle).variants("a")
    assert str(bundle) in str(caught.value)


@pytest.mark.parametrize("request_", [None, 5, [1], {"calibration": None}, {"calibration": [1]}])
def test_a_request_of_other_forms_is_refused(bundle: Path, request_: object) -> None:
    with edited_manifest(bundle) as manifest:
        manifest["additional_metadata"]["cpcompile"]["request"] = request_
    with pytest.raises(UsageError, match="malformed"):
        open_bundle(bundle)


@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: "REMOVE" if value is REMOVE else repr(value))
@pytest.mark.parametrize(
    "path",
    [
        "variants",
        "variants/cpu-fp32",
        "variants/cpu-fp32/ep",
        "variants/cpu-fp32/executor_info",
        "variants/cpu-fp32/executor_info/ort",
        "variants/cpu-fp32/executor_info/cpcompile/bytes",
    ],
)
def test_a_component_of_other_forms_is_refused(bundle: Path, path: str, value: object) -> None:
    if path.endswith("/ep") and isinstance(value, str):
        return  # a name that no runtime has is found when it is asked for
    component = bundle / "a" / "component.json"
    body = json.loads(component.read_text())
    put(body, path, 5.5 if value == 5 and path.endswith("bytes") else value)
    component.write_text(json.dumps(body))
    with edited_manifest(bundle) as manifest:
        manifest["additional_metadata"]["cpcompile"]["files"]["a/component.json"] = file_digest(component)
    with pytest.raises(UsageError, match="malformed"):
        open_bundle(bundle)


def test_only_a_bundle_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "extension"
    mine.mkdir()
    (mine / "manifest.json").write_text('{"name": "a web extension"}')
    (mine / "precious.js").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        write(mine)
    assert (mine / "precious.js").read_text() == "mine"
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        write(mine / "precious.js")
    with pytest.raises(UsageError, match="choose another output"):
        write(Path("/"))


def test_a_file_that_somebody_put_into_a_bundle_is_not_lost(bundle: Path) -> None:
    (bundle / "a" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"a/notes.txt is not part of the bundle"):
        write(bundle)
    (bundle / "a" / "notes.txt").unlink()
    (bundle / "report.json").write_text("{}")
    assert write(bundle, content=b"new") == bundle


def test_a_link_to_a_bundle_stays_one(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle)
    write(link, content=b"new")
    assert link.is_symlink()
    assert (bundle / "a" / "cpu-fp32" / "model.onnx").read_bytes() == b"new"


def test_weights_behind_a_link_are_refused(bundle: Path, tmp_path: Path) -> None:
    variant = open_bundle(bundle).variant("a", "cpu-fp32")
    assert variant.weights is not None
    weights = variant.weights / "weights.bin"
    weights.rename(tmp_path / "weights.bin")
    weights.symlink_to(tmp_path / "weights.bin")
    with pytest.raises(UsageError, match="leaves the bundle"):
        open_bundle(bundle).verify(variant.weights)


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(bundle / "a" / "component.json", tmp_path / "component.json")
    (bundle / "a" / "component.json").unlink()
    (bundle / "a" / "component.json").symlink_to(tmp_path / "component.json")
    with pytest.raises(UsageError, match="leaves the bundle"):
        open_bundle(bundle)


def test_a_new_bundle_takes_the_place_of_the_old(bundle: Path) -> None:
    write(bundle, content=b"second", contexts=("c",))
    assert open_bundle(bundle).contexts == ("c",)
    assert [p.name for p in bundle.parent.iterdir()] == ["model.cpc"]


def test_a_failed_write_leaves_the_old_bundle(bundle: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), BundleWriter(bundle) as writer:
        (writer.folder("x", "y") / "half").write_bytes(b"half")
        raise RuntimeError("stop")
    assert open_bundle(bundle).contexts == ("a", "b")
    assert [p.name for p in bundle.parent.iterdir()] == ["model.cpc"]


def test_a_killed_write_leaves_the_old_bundle_and_is_cleared_away(bundle: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cpcompile.bundle.writer import BundleWriter\n"
        f"with BundleWriter(Path({str(bundle)!r})) as writer:\n"
        "    (writer.folder('x', 'y') / 'half').write_bytes(b'half'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(bundle.parent.iterdir())) == 2
        write(bundle, content=b"third")  # another build at work is left alone
        assert len(list(bundle.parent.iterdir())) == 2
        process.kill()
    assert (bundle / "a" / "cpu-fp32" / "model.onnx").read_bytes() == b"third"
    open_bundle(bundle).verify(bundle / "a", bundle / "shared_assets")
    write(bundle, content=b"fourth")
    assert [p.name for p in bundle.parent.iterdir()] == ["model.cpc"]


def test_a_folder_of_other_things_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        BundleWriter(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        BundleWriter(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_sentence(bundle: Path) -> None:
    with pytest.raises(CpcompileError, match="disk is full"), BundleWriter(bundle) as writer:
        (writer.root / "weights.bin").symlink_to("/dev/full")
        with (writer.root / "weights.bin").open("wb") as file:
            file.write(b"x")
    assert open_bundle(bundle).contexts == ("a", "b")
