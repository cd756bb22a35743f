"""`headway doctor`: hardware and software of this machine, and the fallback for each missing feature."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from headway.kernels.levers import APEX_MODULES, FA3_MODULE, FLA_MODULE, LIGER_MODULE, importable
from headway.launcher.base import console
from headway.launcher.plan.precision import bf16_on_cpu

PYTHONS = ((3, 11), (3, 12))
_GIB = 1 << 30


@dataclass(frozen=True)
class Fact:
    """One line of the output. `state`: ok; absent: optional and missing; wrong: required, and `use` gives advice."""

    name: str
    state: Literal["ok", "absent", "wrong"]
    found: str
    use: str = ""


def doctor(*, as_json: bool = False) -> int:
    """Print the facts. Returns 0 if all requirements are met, else 1."""
    facts = inspect_machine()
    wrong = [fact for fact in facts if fact.state == "wrong"]
    if as_json:
        console.emit({"ready": not wrong, "facts": [asdict(fact) for fact in facts]}, indent=2)
        return 1 if wrong else 0
    wide = max(len(fact.name) for fact in facts)
    for fact in facts:
        mark = {"ok": "ok", "absent": "--", "wrong": "!!"}[fact.state]
        line = f"{mark}  {fact.name:<{wide}}  {fact.found}{f': {fact.use}' if fact.use else ''}"
        console.result(console.paint(line, "red", sys.stdout) if fact.state == "wrong" else line)
    verdict = f"not ready: see {', '.join(fact.name for fact in wrong)}" if wrong else "ready to train"
    console.result(verdict)
    return 1 if wrong else 0


def inspect_machine() -> list[Fact]:
    """All facts in the order of the output. Imports torch and external mechanisms; only searches for other packages."""
    facts = [_python(), _cores(), _memory(), _disk(), _compiler()]
    facts += _requirements()
    facts += _torch_and_devices()
    libraries = (_apex(), _liger(), _triton(), _flash_attention(), _linear_attention())
    return [*facts, *_levers(), *_fp8(), *libraries, *_extras(), *_mechanisms()]


def _python() -> Fact:
    version = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] in PYTHONS:
        return Fact("python", "ok", version)
    return Fact("python", "wrong", version, "make an environment with Python 3.11 or 3.12")


def _cores() -> Fact:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    limited = f", of which a container limit leaves {quota:g}" if quota is not None and quota < usable else ""
    return Fact("cores", "ok", f"{usable} usable of {os.cpu_count()}{limited}")


def _cpu_quota(file: Path) -> float | None:
    """Number of cores that a cgroup (version 2) allows; None if there is no limit."""
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max" is not a number and means no limit
        return None


def _memory() -> Fact:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return Fact("memory", "absent", "not known on this system")
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, free = kib["MemTotal"] * 1024 / _GIB, kib.get("MemAvailable", kib["MemFree"]) * 1024 / _GIB
    return Fact("memory", "ok", f"{free:.1f} GiB available of {total:.1f} GiB")


def _disk() -> Fact:
    usage = shutil.disk_usage(".")
    return Fact("disk", "ok", f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB here")


def _compiler() -> Fact:
    path = shutil.which("gcc") or shutil.which("cc")
    if path is None:
        return Fact(
            "gcc", "absent", "no C compiler", "operations that are compiled at first use (Triton) are not available"
        )
    try:
        done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, timeout=10, check=False)
        return Fact("gcc", "ok", f"{done.stdout.strip() or 'version unknown'} ({path})")
    except (OSError, subprocess.TimeoutExpired):
        return Fact("gcc", "absent", f"{path} does not run")


def _requirements() -> list[Fact]:
    """Requirements of the installed distribution, from metadata only: some packages take seconds to import."""
    try:
        lines = [line for line in metadata.requires("headway") or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return [Fact("headway", "wrong", "not installed", "pip install -c constraints.txt -e .")]
    facts, rest = [Fact("headway", "ok", metadata.version("headway"))], []
    for line in lines:
        name = re.split(r"[<>=!~;\[ (]", line, maxsplit=1)[0]
        version = _version(name)
        if version is None or not _satisfies(line, version):
            found = "missing" if version is None else f"{version}, but {line} is needed"
            facts.append(Fact(name, "wrong", found, "pip install -c constraints.txt -e ."))
        elif name in ("deepspeed", "mosaicml-streaming"):
            facts.append(Fact(name, "ok", version))
        elif name != "torch":  # torch has its own line
            rest.append(f"{name} {version}")
    return [*facts, Fact("packages", "ok", ", ".join(rest))]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _satisfies(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # not a dependency of Headway; without it the version is shown but not checked
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _torch_and_devices() -> list[Fact]:
    try:
        import torch
    except Exception as error:  # a broken CUDA library raises OSError, a missing one ImportError
        return [Fact("torch", "wrong", f"cannot be imported: {error}", "pip install -c constraints.txt -e .")]
    facts = [Fact("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        reason = "no device" if torch.version.cuda else "torch is built for CPU"
        facts.append(Fact("cuda", "absent", reason, "CPU and gloo are used"))
        return [*facts, Fact("bf16", "ok", *bf16_on_cpu())]
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        shown = f"{device.name}, {device.total_memory / _GIB:.0f} GiB, compute {device.major}.{device.minor}"
        facts.append(Fact(f"cuda:{index}", "ok", f"{shown}, CUDA {torch.version.cuda}"))
    return facts


def _levers() -> list[Fact]:
    """Features of torch and of the compilers that the section `speed` of a spec can use, and its defaults here."""
    try:
        import torch
        import torch.nn.functional as functional
    except Exception:  # torch has its own line
        return []
    compiled = _compiled_on_gpu() if torch.cuda.is_available() else _compiled_on_cpu()
    if hasattr(functional, "linear_cross_entropy"):
        return [compiled, Fact("speed.loss", "ok", "chunked (Headway's own, the default); torch, in precision fp32")]
    absent = "a PyTorch before 2.13, without linear_cross_entropy"
    return [compiled, Fact("speed.loss", "absent", absent, "chunked, Headway's own, is used")]


def _compiled_on_cpu() -> Fact:
    gxx = shutil.which(os.environ.get("CXX", "g++"))
    if gxx:
        return Fact("speed.compile", "ok", f"auto is none on the CPU; elementwise and block can compile with {gxx}")
    return Fact("speed.compile", "absent", "no g++ for the CPU", "use none, which auto is on the CPU")


def _compiled_on_gpu() -> Fact:
    """The default compiles, so a run with it does not start without a compiler."""
    gcc = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    missing = [name for name, there in (("Triton", importable("triton")), ("gcc", gcc)) if not there]
    if not missing:
        return Fact("speed.compile", "ok", f"auto is elementwise on a GPU, compiled with Triton and {gcc}")
    found = f"auto is elementwise on a GPU, which needs {' and '.join(missing)}"
    return Fact("speed.compile", "wrong", found, "install it, or set speed.compile: none in specs")


def _fp8() -> list[Fact]:
    """Whether `speed.matmul: fp8` runs here."""
    try:
        import torch

        from headway.kernels.fp8 import check_fp8
        from headway.kernels.levers import LeverError
    except Exception:  # torch has its own line
        return []
    there = torch.cuda.is_available()
    try:
        check_fp8("cuda" if there else "cpu", torch.bfloat16, torch.cuda.get_device_capability() if there else None)
    except LeverError as why:
        reason = str(why).removeprefix("speed.matmul: ").split(";")[0]
        return [Fact("speed.matmul", "absent", reason, "none, the default, is used")]
    return [Fact("speed.matmul", "ok", "none is the default; fp8 runs here, in precision bf16")]


def _liger() -> Fact:
    if importable(LIGER_MODULE):
        return Fact("liger", "ok", f"{_version('liger-kernel') or 'version unknown'}, for speed.norm and speed.loss")
    return Fact("liger", "absent", "no liger-kernel", "PyTorch's norm and the chunked loss are used")


def _linear_attention() -> Fact:
    if importable(FLA_MODULE):
        version = _version("flash-linear-attention") or "version unknown"
        return Fact("fla", "ok", f"{version}, for speed.delta on a GPU in bf16, if it agrees with Headway's own form")
    return Fact("fla", "absent", "no flash-linear-attention", "Headway's own form of the gated delta rule is used")


def _apex() -> Fact:
    instead = "the fused operations of PyTorch are used"
    if all(importable(module) for module in APEX_MODULES):
        return Fact("apex", "ok", f"NVIDIA apex with {', '.join(APEX_MODULES)}, for speed.norm")
    if not importable("apex"):
        return Fact("apex", "absent", "no NVIDIA apex", instead)
    note = "a package apex without NVIDIA's fused modules (the one on PyPI is another project)"
    return Fact("apex", "absent", note, f"{instead}; see Dockerfile for how to build NVIDIA's")


def _triton() -> Fact:
    version = _version("triton")
    if version is not None and importable("triton"):
        return Fact("triton", "ok", version)
    return Fact(
        "triton", "absent", "no Triton", "the operations of PyTorch are used; pip install 'headway[gpu]' adds it"
    )


def _flash_attention() -> Fact:
    instead = "scaled_dot_product_attention of PyTorch is used, on a GPU cuDNN's before flash"
    if importable(FA3_MODULE):
        return Fact("flash-attn", "ok", "FlashAttention-3, for speed.attention: fa3")
    if importable("flash_attn"):
        return Fact("flash-attn", "absent", "FlashAttention-2 alone, which PyTorch has too", instead)
    return Fact("flash-attn", "absent", "no flash-attn", instead)


_EXTRAS = {
    "wandb": ("wandb", "wandb", "tracking.wandb is refused"),
    "mlflow": ("mlflow", "mlflow-skinny", "tracking.mlflow is refused"),
    "hf": (
        "transformers",
        "transformers",
        "`headway import`, `headway export --to hf` and `import headway.hf` need it",
    ),
    "eval": ("lm_eval", "lm-eval", "`headway eval` has its own tasks and no others"),
}
"""Extra -> its module, its distribution, and what is missing without it."""


def _extras() -> list[Fact]:
    """Packages of the extras that commands or specs may need."""
    facts = []
    for extra, (module, distribution, without) in _EXTRAS.items():
        if importable(module):
            facts.append(Fact(distribution, "ok", _version(distribution) or "version unknown"))
        else:
            adds = f"{without}; pip install -c constraints.txt 'headway[{extra}]' adds it"
            facts.append(Fact(distribution, "absent", f"no {distribution}", adds))
    return facts


def _mechanisms() -> list[Fact]:
    """Attention mechanisms of other packages. Imports each of them. A broken one affects only specs that name it."""
    try:
        from headway.model.attention.external import package_of, registered
        from headway.model.attention.registry import EXTERNALS
    except Exception:  # torch or one of its requirements is broken, and has its own line
        return []
    facts, problems = [], EXTERNALS.problems()
    for name, entries in registered().items():
        if name in problems:
            facts.append(Fact(f"mechanism {name}", "absent", "cannot be used", problems[name]))
        else:
            facts.append(Fact(f"mechanism {name}", "ok", f"{package_of(entries[0])}, {entries[0].value}"))
    return facts
