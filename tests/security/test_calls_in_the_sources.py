"""Functions that the sources never call, checked in their syntax trees, so that comments do not count. Vector 17."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("launcher", "model", "data", "parallel", "kernels")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

NEVER = {
    *("eval", "exec", "compile", "__import__", "execfile", "input"),
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "yaml.Loader"),
    *("os.system", "os.popen", "os.spawnl", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("tempfile.mktemp", "tarfile", "zipfile", "shutil.unpack_archive", "xml", "numpy.frompyfunc"),
    *("dist.all_gather_object", "dist.broadcast_object_list", "dist.gather_object", "torch.distributed.rpc"),
}
KEYWORDS = {
    "shell": True,
    "weights_only": False,
    "trust_remote_code": True,
    "allow_pickle": True,
    "allow_unsafe_types": True,
}
TEXTS = ("0.0.0.0", "--bind_all", "StrictHostKeyChecking=no")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all calls and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, dotted(node.func)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, dotted(node)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def unsafe(tree: ast.AST) -> list[tuple[int, str]]:
    found = [(line, n) for line, n in names(tree) if n in NEVER or n.partition(".")[0] in NEVER]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [
                (node.lineno, str(k.arg)) for k in node.keywords if _is_constant(k.value, KEYWORDS.get(str(k.arg)))
            ]
            starts = dotted(node.func) in (
                "subprocess.run",
                "subprocess.Popen",
                "subprocess.check_output",
                "subprocess.call",
            )
            if starts and node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append((node.lineno, "a command that is no list"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [(node.lineno, text) for text in TEXTS if text in node.value]
    return found


def _is_constant(node: ast.expr, value: bool | None) -> bool:
    return value is not None and isinstance(node, ast.Constant) and node.value is value


def test_nothing_that_runs_data_as_code_is_called():
    assert len(SOURCES) > 400
    found = {str(path.relative_to(ROOT)): unsafe(ast.parse(path.read_text())) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads as l",
        "import torch as t; torch.load(f)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run('ls ' + x)",
        "subprocess.run(f'ls {x}')",
        "subprocess.run(x, shell=True)",
        "eval(x)",
        "server.bind(('0.0.0.0', 1))",
    ],
)
def test_the_search_finds_forbidden_calls(text):
    assert unsafe(ast.parse(text))


def test_the_search_ignores_other_text():
    assert (
        unsafe(ast.parse("model.eval(); np.load(f, allow_pickle=False); subprocess.run(['ls', x]); re.compile(x)"))
        == []
    )
