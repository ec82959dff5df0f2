"""Examine the machine: what each target needs, what works, and the commands that fix the rest.

target            builds with                                runs with
cpu-fp32          the extra build                            ONNX Runtime on the CPU
cpu-fp32-merged   the same                                   the same
cuda-fp16         the same                                   its CUDA, TensorRT or TensorRT-RTX provider, a GPU
tensorrt          the same, tensorrt and a GPU               a GPU, torch for CUDA
tensorrt-rtx      the same and tensorrt-rtx                  a GPU, torch for CUDA
openvino-fp32     the same                                   openvino
openvino-bf16     the same                                   openvino, a processor with bfloat16
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from cpcompile.core.errors import first_line
from cpcompile.core.extras import BUILD, RUNTIME
from cpcompile.core.measured import NotMeasured
from cpcompile.doctor import look
from cpcompile.doctor.finding import Finding
from cpcompile.doctor.trials import run_trial
from cpcompile.machine.gpu import NO_GPU, NO_NVML

SCHEMA_VERSION = 1
DEPENDENCIES = (*RUNTIME, *BUILD)
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
PROVIDERS = ("CPUExecutionProvider", *GPU_PROVIDERS)
PROVIDER_FIXES: Mapping[str, tuple[str, ...]] = {
    "CPUExecutionProvider": ("pip install --force-reinstall onnxruntime",),
    "CUDAExecutionProvider": ("pip uninstall -y onnxruntime", "pip install 'cpcompile[gpu]'"),
    "TensorrtExecutionProvider": (
        "pip uninstall -y onnxruntime",
        "pip install 'cpcompile[gpu,tensorrt]'",
    ),
    "NvTensorRTRTXExecutionProvider": ("pip install onnxruntime-ep-nv-tensorrt-rtx",),
}
DRIVER, GPU = "nvidia-driver", "nvidia-gpu"
BF16 = "bfloat16"
MAIN_TARGET = "cpu-fp32"

Status = Literal["works", "builds", "runs", "no"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine that `build` makes, and the findings that it needs."""

    name: str
    builds_with: tuple[str, ...]
    runs_with: tuple[str, ...]
    any_of: tuple[str, ...] = ()
    """Findings of which one is enough to run it."""


TARGETS = (
    Target(name=MAIN_TARGET, builds_with=DEPENDENCIES, runs_with=(*RUNTIME, "CPUExecutionProvider")),
    Target(name="cpu-fp32-merged", builds_with=DEPENDENCIES, runs_with=(*RUNTIME, "CPUExecutionProvider")),
    Target(name="cuda-fp16", builds_with=DEPENDENCIES, runs_with=(*RUNTIME, GPU), any_of=GPU_PROVIDERS),
    Target(name="tensorrt", builds_with=(*DEPENDENCIES, "tensorrt", GPU), runs_with=(GPU, "torch-cuda")),
    Target(name="tensorrt-rtx", builds_with=(*DEPENDENCIES, "tensorrt-rtx"), runs_with=(GPU, "torch-cuda")),
    Target(name="openvino-fp32", builds_with=DEPENDENCIES, runs_with=(*RUNTIME, "onnxruntime", "openvino")),
    Target(name="openvino-bf16", builds_with=DEPENDENCIES, runs_with=(*RUNTIME, "onnxruntime", "openvino", BF16)),
)


@dataclass(frozen=True, kw_only=True)
class TargetState:
    """How far a target works: `builds` means that it cannot be run, `runs` that it cannot be built."""

    name: str
    status: Status
    needs: tuple[str, ...]
    missing: tuple[str, ...]
    """The needs that are not ok; where one of several would do, all of them."""
    reason: str
    fix: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that was found."""

    findings: tuple[Finding, ...]
    targets: tuple[TargetState, ...]
    gpus: tuple[Mapping[str, Any], ...]
    """The name, compute_capability and memory_bytes of each GPU."""

    @property
    def healthy(self) -> bool:
        """Whether CPU engines run here, and nothing that building them needs is broken; it may be left out."""
        broken = {finding.name for finding in self.findings if finding.state == "broken"}
        (main,) = (target for target in self.targets if target.name == MAIN_TARGET)
        return main.status in ("works", "runs") and broken.isdisjoint(main.missing)

    @property
    def fixes(self) -> dict[tuple[str, ...], list[str]]:
        """Each list of commands once, with the names of what it fixes: broken findings, and targets."""
        fixes: dict[tuple[str, ...], list[str]] = {}
        broken = [finding for finding in self.findings if finding.state == "broken"]
        for name, fix in [(each.name, each.fix) for each in broken] + [(each.name, each.fix) for each in self.targets]:
            if fix and name not in fixes.setdefault(fix, []):
                fixes[fix].append(name)
        return fixes

    def as_json(self) -> dict[str, Any]:
        """The findings for scripts; a change of keys changes SCHEMA_VERSION."""
        return {"schema_version": SCHEMA_VERSION, "healthy": self.healthy, **asdict(self)}


def examine() -> Examination:
    """Run all probes at once; no package can make this fail."""
    probes: Mapping[str, Callable[[], Sequence[Finding]]] = {
        "python": lambda: [look.python()],
        "onnxruntime": _onnxruntime,
        "torch": lambda: [look.torch()],
        "torch-cuda": lambda: [_tried(look.torch_cuda(), "torch-cuda")],
        **{name: partial(_dependency, name) for name in DEPENDENCIES if name != "torch"},
        "tensorrt": lambda: [_tried(look.package("tensorrt", "tensorrt", extra="tensorrt"), "tensorrt", "tensorrt")],
        "tensorrt-rtx": lambda: [
            _tried(look.package("tensorrt-rtx", "tensorrt_rtx", extra="tensorrt-rtx"), "tensorrt", "tensorrt_rtx")
        ],
        "openvino": lambda: [_tried(look.package("openvino", "openvino", extra="openvino"), "openvino")],
        BF16: lambda: [_bfloat16()],
        "transformers": lambda: [look.package("transformers", "transformers", extra="hf")],
        "gguf": lambda: [look.package("gguf", "gguf", extra="hf")],
        "pyarrow": lambda: [look.package("pyarrow", "pyarrow", extra="parquet")],
        "cmake": lambda: [look.program("cmake", package="cmake")],
        "c++": lambda: [look.program("c++", package="g++")],
        "onnxruntime-headers": lambda: [look.onnxruntime_headers()],
        "chromium": lambda: [look.program("chromium", *look.BROWSERS, package="chromium")],
    }
    with ThreadPoolExecutor(len(probes) + 1) as pool:
        card = pool.submit(_nvidia)
        parts = pool.map(lambda name: _guarded(name, probes[name]), probes)
        driver, gpus = card.result()
        findings = [*(finding for part in parts for finding in part), *driver]
    known = {finding.name: finding for finding in findings}
    return Examination(
        findings=tuple(findings), targets=tuple(_judge(target, known) for target in TARGETS), gpus=tuple(gpus)
    )


def _dependency(name: str) -> Sequence[Finding]:
    return [look.package(name, name.replace("-", "_"), extra="build" if name in BUILD else None)]


def _guarded(name: str, probe: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    try:
        return probe()
    except Exception as error:  # metadata that is not text, a module that is an empty folder, ...
        wrong = f"cannot be examined ({type(error).__name__}: {first_line(error)})"
        again = f"pip install --force-reinstall {name}"
        return [Finding(name=name, state="broken", detail=wrong, fix=(again,))]


def _tried(found: Finding, trial: str, *arguments: str) -> Finding:
    """`found`, or a broken finding where the trial fails."""
    if found.state != "ok":
        return found
    result = run_trial(trial, *arguments)
    if isinstance(result, NotMeasured):
        again = f"pip install --force-reinstall {found.name}"
        return Finding(name=found.name, state="broken", version=found.version, detail=result.reason, fix=(again,))
    return found


def _onnxruntime() -> Sequence[Finding]:
    """The findings of the wheel and of each provider."""
    found = look.onnxruntime()
    result = NotMeasured(found.detail) if found.state == "absent" else run_trial("onnxruntime")
    if isinstance(result, NotMeasured):
        again = found.fix or ("pip install --force-reinstall onnxruntime",)
        broken = Finding(
            name="onnxruntime",
            state="absent" if found.state == "absent" else "broken",
            version=found.version,
            detail=found.detail if found.state != "ok" else result.reason,
            fix=again,
        )
        because = "ONNX Runtime is not installed" if found.state == "absent" else "ONNX Runtime does not work"
        return [broken, *(Finding(name=name, state="absent", detail=because, fix=again) for name in PROVIDERS)]
    return [found, *(_provider(name, result["providers"][name]) for name in PROVIDERS)]


def _provider(name: str, reason: str | None) -> Finding:
    if reason is None:
        return Finding(name=name, state="ok", detail="ran a model")
    detail = reason.partition("`cpcompile")[0].removeprefix(f"needs {name}; ").strip(" ;.")
    if name in GPU_PROVIDERS and not look.nvidia_here():
        return Finding(name=name, state="absent", detail=detail)
    there = "fell back" in reason or ("cannot" in reason and "No module named" not in reason)
    return Finding(name=name, state="broken" if there else "absent", detail=detail, fix=PROVIDER_FIXES[name])


def _bfloat16() -> Finding:
    """Whether the processor computes in bfloat16, as OpenVINO finds out."""
    (library,) = _guarded("openvino", lambda: [look.package("openvino", "openvino")])
    if library.state != "ok":
        return Finding(name=BF16, state="absent", detail="OpenVINO, which would know, is not installed")
    result = run_trial("openvino")
    if isinstance(result, NotMeasured):
        return Finding(name=BF16, state="absent", detail="OpenVINO, which would know, does not work")
    there = "BF16" in result["capabilities"]
    detail = "this processor has " + ("instructions for it" if there else "no instructions for it")
    return Finding(name=BF16, state="ok" if there else "absent", detail=detail)


def _nvidia() -> tuple[Sequence[Finding], Sequence[Mapping[str, Any]]]:
    """The findings of driver and GPU; the PCI bus shows a card even without a driver."""
    result = run_trial("nvidia")
    if not isinstance(result, NotMeasured):
        names = ", ".join(f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in result["gpus"])
        driver = Finding(name=DRIVER, state="ok", version=result["driver"])
        gpu = Finding(name=GPU, state="ok" if names else "absent", detail=names or NO_GPU)
        return [driver, gpu], result["gpus"]
    if not look.nvidia_here():
        absent = [Finding(name=name, state="absent", detail=NO_GPU) for name in (DRIVER, GPU)]
        return absent, []
    install = ("pip install nvidia-ml-py",) if NO_NVML in result.reason else ("sudo apt-get install nvidia-driver",)
    detail = result.reason.removeprefix("ValueError: ")
    return [Finding(name=name, state="broken", detail=detail, fix=install) for name in (DRIVER, GPU)], []


def _judge(target: Target, known: Mapping[str, Finding]) -> TargetState:
    def lacking(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if known[name].state != "ok")

    choice = lacking(target.any_of)
    choice = choice if len(choice) == len(target.any_of) else ()
    to_build, to_run = lacking(target.builds_with), (*lacking(target.runs_with), *choice)
    runs, builds = not to_run, not to_build
    status: Status = "no"
    if runs or (builds and target.builds_with):
        status = "works" if runs and builds else "builds" if builds else "runs"
    missing = tuple(dict.fromkeys((*to_build, *to_run)))
    first = [name for name in missing if name not in choice[1:]]  # where one of several would do, the first
    fixed = first
    if known[GPU].state == "absent":  # no command adds a GPU
        fixed = [] if GPU in to_build else list(to_build) if GPU in to_run else first
    return TargetState(
        name=target.name,
        status=status,
        needs=tuple(dict.fromkeys((*target.builds_with, *target.runs_with, *target.any_of))),
        missing=missing,
        reason=_reason([known[name] for name in first]),
        fix=tuple(dict.fromkeys(command for name in fixed for command in known[name].fix)),
    )


def _reason(findings: Sequence[Finding]) -> str:
    """What is wrong, each detail once, behind the names that it is about."""
    names: dict[str, list[str]] = {}
    for finding in findings:
        names.setdefault(finding.detail, []).extend([finding.name] if finding.name != GPU else [])
    return "; ".join(f"{', '.join(about)}: {detail}" if about else detail for detail, about in names.items())
