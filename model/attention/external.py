"""Mechanisms of other installed packages, registered under the entry point group `headway.mechanisms`.

The name of an entry point is the `attention.type` of specs, its value the config class:

    [project.entry-points."headway.mechanisms"]
    my_mechanism = "my_package.my_module:MyConfig"

Entry points are read from the metadata of installed packages, once per process and only when a name is asked for that
is not built in. A package is imported only when a spec names its mechanism.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Collection
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from headway.model.base import AttentionConfig, AttentionSection

GROUP = "headway.mechanisms"


class MechanismError(ValueError):
    """A registered mechanism cannot be used. The message names the package and says what to do next."""

    exit_code = 64


@cache
def registered() -> dict[str, tuple[metadata.EntryPoint, ...]]:
    """Name -> the entry points under it, several where packages clash, sorted by name. Imports no package."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return {name: tuple(found[name]) for name in sorted(found)}


def package_of(entry: metadata.EntryPoint) -> str:
    """`my-package 1.2.3`, of the distribution that registers an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown package"


class Externals:
    """The registered mechanisms besides the built-in ones, whose names are `taken`. Each package is imported once."""

    def __init__(self, taken: Collection[str]) -> None:
        self.taken = taken
        self._loaded: dict[str, type[AttentionConfig] | MechanismError] = {}

    def names(self) -> list[str]:
        """Names that a spec may use, whether or not the package can be imported."""
        return [name for name in registered() if name not in self.taken]

    def load(self, name: str) -> type[AttentionConfig]:
        """The config class registered under a name of `names`. Raises MechanismError where it cannot be used."""
        if name not in self._loaded:
            try:
                self._loaded[name] = _load(name, registered()[name])
            except MechanismError as error:
                self._loaded[name] = error
        found = self._loaded[name]
        if isinstance(found, MechanismError):
            raise found
        return found

    def find(self, tag: str) -> type[AttentionConfig] | None:
        """The same, or None for a name that is not registered or cannot be used."""
        if tag in self.taken or tag not in registered():
            return None
        try:
            return self.load(tag)
        except MechanismError:
            return None

    def problems(self) -> dict[str, str]:
        """Name -> why it cannot be used, of everything registered; imports all packages."""
        found = {name: _clash(name, registered()[name]) for name in registered() if name in self.taken}
        for name in self.names():
            try:
                self.load(name)
            except MechanismError as error:
                found[name] = str(error)
        return found


def provenance(section: AttentionSection) -> dict[str, str]:
    """Of an external mechanism: name, package with its version, hash of the package's sources. Built in: empty.

    Of several in one model, those that are external: their texts are joined by ", ".

    `sources` is a sha256 (16 hex digits) over the .py files of the top-level package (or module) of the class, and of
    those of its base classes and nested configs that are not Headway's: hosts with different ones compute differently.
    """
    found = [one for _, config in section.mechanisms() if (one := _provenance(config))]
    unique = [one for i, one in enumerate(found) if one not in found[:i]]
    return {key: ", ".join(one[key] for one in unique) for key in (unique[0] if unique else ())}


def _provenance(config: AttentionConfig) -> dict[str, str]:
    modules = sorted({_top(cls) for cls in _classes(type(config))} - _OTHERS)
    if not modules:
        return {}
    entries = registered().get(config.type, ())
    found = hashlib.sha256()
    for module in modules:
        for name, path in _sources(module):
            found.update(name.encode() + b"\0" + path.read_bytes())
    package = package_of(entries[0]) if entries else "not registered"
    return {"name": config.type, "package": package, "sources": found.hexdigest()[:16]}


_OTHERS = {"headway", "pydantic", *sys.stdlib_module_names}
"""Top-level modules that are no part of an external mechanism."""


def _classes(config: type[AttentionConfig]) -> list[type]:
    """The class, its bases, and the config classes of its fields with theirs."""
    from pydantic import BaseModel

    seen: list[type] = []
    waiting: list[Any] = [config]
    while waiting:
        item = waiting.pop()
        waiting += get_args(item)
        if isinstance(item, type) and issubclass(item, BaseModel) and item not in seen:
            seen += [base for base in item.__mro__ if base not in seen]
            waiting += [info.annotation for info in item.model_fields.values()]
    return seen


def _top(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _sources(module: str) -> list[tuple[str, Path]]:
    """(name relative to the package, path) of the sources of an imported top-level package or module."""
    found = importlib.import_module(module)
    roots = [Path(root) for root in getattr(found, "__path__", ())]
    if roots:
        files = [(f"{module}/{p.relative_to(r).as_posix()}", p) for r in roots for p in r.rglob("*.py")]
        return sorted(files)
    return [(f"{module}.py", Path(found.__file__))] if found.__file__ else []


def _load(name: str, entries: tuple[metadata.EntryPoint, ...]) -> type[AttentionConfig]:
    entry, *others = entries
    if others:
        raise MechanismError(_clash(name, entries))
    where = f"{package_of(entry)} registers {name} as {entry.value}"
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise MechanismError(
            f"{where}, which cannot be imported ({told}); repair or update that package, or use another type"
        ) from error
    if wrong := _unfit(name, found):
        raise MechanismError(f"{where}, which {wrong}; ask its authors for a version that fits this Headway")
    return found


def _clash(name: str, entries: tuple[metadata.EntryPoint, ...]) -> str:
    packages = " and ".join(package_of(entry) for entry in entries)
    if len(entries) > 1:
        return f"{packages} both register {name}; uninstall all but one of them"
    return f"{packages} registers {name}, which is built in; the built-in one is used, and that one needs a name"


def _unfit(name: str, found: Any) -> str | None:
    """Why an object is not the config class of the mechanism `name`."""
    if not (isinstance(found, type) and issubclass(found, AttentionConfig)):
        return "is no subclass of headway.model.base.AttentionConfig"
    declared: Any = found.model_fields["type"].annotation
    if get_args(declared) != (name,) or found.model_fields["type"].default != name:
        return f'does not declare `type: Literal["{name}"] = "{name}"`'
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        return f"does not define {', '.join(missing)}"
    if inspect.isabstract(found):
        return "is abstract"
    return None
