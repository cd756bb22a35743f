"""The image is described by pinned parts and does not run as root. (Building it needs a Docker daemon.)"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
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


def test_the_base_images_are_of_one_full_version_with_a_compiler_in_the_first_stage_only(
    steps: list[tuple[str, str]],
) -> None:
    build, image = all_of(steps, "FROM")
    first = re.fullmatch(r"nvidia/cuda:(\d+\.\d+\.\d+)-cudnn-devel-(ubuntu\d\d\.\d\d) AS build", build)
    second = re.fullmatch(r"nvidia/cuda:(\d+\.\d+\.\d+)-cudnn-runtime-(ubuntu\d\d\.\d\d)", image)
    assert first is not None and second is not None and first.groups() == second.groups()
    assert "--from=build /opt/headway /opt/headway" in all_of(steps, "COPY")
    late = " ".join(all_of(steps[steps.index(("FROM", image)) :], "RUN"))
    assert "libibverbs1" in late and "librdmacm1t64" in late and "build-essential" not in late and "pip" not in late


def test_the_python_is_the_one_that_the_tests_run_with(steps: list[tuple[str, str]]) -> None:
    tested = re.search(r"tested with, on CPython (\d+\.\d+) and Linux", (ROOT / "constraints.txt").read_text())
    (version,) = [rest for rest in all_of(steps, "ARG") if rest.startswith("PYTHON_VERSION=")]
    assert tested is not None and re.fullmatch(rf"PYTHON_VERSION={re.escape(tested[1])}\.\d+", version)
    text = " ".join(rest for _, rest in steps)
    assert 'uv python install "$PYTHON_VERSION"' in text and not re.search(r"python3\.\d", text)
    assert re.search(r"--from=ghcr\.io/astral-sh/uv:\d+\.\d+\.\d+ ", text)
    late = steps[steps.index(("FROM", all_of(steps, "FROM")[1])) :]
    assert ("COPY", "--from=build /opt/python /opt/python") in late  # to which the links of /opt/headway lead


def test_a_changed_source_does_not_install_the_dependencies_again(steps: list[tuple[str, str]]) -> None:
    sources = steps.index(("COPY", ". /build/headway"))
    dependencies = next(i for i, (_, rest) in enumerate(steps) if "-r /build/requirements.txt" in rest)
    assert dependencies < sources
    (command,) = re.findall(r'python -c "(import tomllib; .*?)" > /build/requirements.txt', steps[dependencies][1])
    done = subprocess.run([sys.executable, "-c", command.replace("/build", str(ROOT))], capture_output=True, text=True)
    listed = done.stdout.split("\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.returncode == 0 and set(project["dependencies"]) <= set(listed), done.stderr
    assert set(project["optional-dependencies"]["hf"]) <= set(listed)


def test_apex_is_nvidias_source_at_a_pinned_commit_with_its_fused_extensions(steps: list[tuple[str, str]]) -> None:
    (commit,) = [rest for rest in all_of(steps, "ARG") if rest.startswith("APEX_COMMIT=")]
    assert re.fullmatch(r"APEX_COMMIT=[0-9a-f]{40}", commit)
    (build,) = [run for run in all_of(steps, "RUN") if "apex" in run]
    assert "https://github.com/NVIDIA/apex" in build and 'checkout --detach "$APEX_COMMIT"' in build
    assert "APEX_CPP_EXT=1" in build and "APEX_CUDA_EXT=1" in build
    assert "import torch, amp_C, apex_C, fused_layer_norm_cuda" in build  # a build without them would pass silently


def test_python_packages_are_installed_with_the_constraints(steps: list[tuple[str, str]]) -> None:
    installs = [part for run in all_of(steps, "RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 4
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
