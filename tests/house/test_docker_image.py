"""The image is described by pinned parts and does not run as root. (Building it needs a Docker daemon.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """(instruction, argument) in order, comments out, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word, " ".join(rest.split()))
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def all_of(steps: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for each, rest in steps if each == word]


def test_the_base_image_is_a_cuda_compiler_image_pinned_to_a_full_version(steps: list[tuple[str, str]]) -> None:
    (image,) = all_of(steps, "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu\d\d\.\d\d", image)


def test_apex_is_nvidias_source_at_a_pinned_commit_with_its_fused_extensions(steps: list[tuple[str, str]]) -> None:
    (commit,) = [rest for rest in all_of(steps, "ARG") if rest.startswith("APEX_COMMIT=")]
    assert re.fullmatch(r"APEX_COMMIT=[0-9a-f]{40}", commit)
    (build,) = [run for run in all_of(steps, "RUN") if "apex" in run]
    assert "https://github.com/NVIDIA/apex" in build and 'checkout --detach "$APEX_COMMIT"' in build
    assert "APEX_CPP_EXT=1" in build and "APEX_CUDA_EXT=1" in build
    assert "import torch, amp_C, apex_C, fused_layer_norm_cuda" in build  # a build without them would pass silently


def test_python_packages_are_installed_with_the_constraints(steps: list[tuple[str, str]]) -> None:
    installs = [part for run in all_of(steps, "RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("-c /build/constraints.txt" in part or "--no-deps" in part for part in installs)
    assert any("/build/headway[" in part for part in installs)


def test_the_command_runs_as_another_user_than_root_and_imports_nothing_from_its_folder(
    steps: list[tuple[str, str]],
) -> None:
    words = [word for word, _ in steps]
    assert all_of(steps, "USER") == ["headway"] and words.index("USER") > max(
        i for i, word in enumerate(words) if word == "RUN"
    )
    assert "PYTHONSAFEPATH=1" in all_of(steps, "ENV")
    assert all_of(steps, "ENTRYPOINT") == ['["headway"]']


def test_the_build_context_keeps_our_packages_and_leaves_out_what_is_generated() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {".git", ".venv", "/runs", "/studies", "/datasets"} <= set(patterns)
    for folder in ("launcher", "model", "data", "parallel", "kernels", "yaml"):
        assert not {folder, f"/{folder}", f"{folder}/", f"**/{folder}"} & set(patterns)
