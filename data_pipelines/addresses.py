"""What results are found by: hashes of files, of options, and of the code that made them.

Code counts by its syntax tree: comments and docstrings do not. All that a module imports from this package counts with
it, and the packages that it lies in; of other packages their versions.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "data_pipelines"


def key_of(*parts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def sha256_of(path: Path | str) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_of(module: str) -> str:
    """A hash of a module and of all that it imports; see above for what counts. Where the module is of another package,
    as a source may be, that package counts like this one."""
    trees: dict[str, str] = {}
    outside: set[str] = set()
    ours = {PACKAGE, module.partition(".")[0]}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in trees:
            continue
        tree, parent = _tree(name)
        trees[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
        for imported in (*filter(None, [parent]), *_imports(tree, parent, ours)):
            if imported.partition(".")[0] in ours:
                waiting.append(imported)
            else:
                outside.add(imported.partition(".")[0])
    versions = {name: _version(name) for name in outside - sys.stdlib_module_names}
    return key_of(trees, versions, sys.version_info[:2], unicodedata.unidata_version)


def _tree(name: str) -> tuple[ast.Module, str]:
    """A module's code, and the package that it lies in; that of a package is its own."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that a program made up
        spec = None
    if spec is None or spec.origin is None:
        return ast.Module([], []), ""
    return ast.parse(Path(spec.origin).read_bytes()), spec.parent or ""


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def _imports(tree: ast.Module, parent: str, ours: set[str]) -> Iterator[str]:
    """Names of modules. Of `from x import y` both x and x.y, where that is a module of ours; .x is one of `parent`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
            yield module
            if module.partition(".")[0] in ours:
                inner = (f"{module}.{alias.name}" for alias in node.names)
                yield from (name for name in inner if _is_module(name))


@functools.cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        names = _distributions().get(package)
        return importlib.metadata.version(names[0]) if names else ""


@functools.cache
def _distributions() -> Any:
    """Takes a fifth of a second: for packages whose distributions are called otherwise."""
    return importlib.metadata.packages_distributions()
