"""The house rules on size and privacy, checked by the syntax trees of the package.

    size      a file has at most 400 lines, one below `passes` 250; a function 60 and its docstring
    format    the formatter formats all but Triton kernels and their launches, whose arguments keep
              the order and the lines of the kernel's
    private   what a module imports from another of the package is in that one's `__all__`, or a
              submodule; nobody imports or uses a name of another module that begins with `_`

Prints one line for each rule that is broken; the exit code is 1 if there is any.

    python tools/house_rules.py [PACKAGE]
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["LONG_FUNCTIONS", "broken_rules", "main"]

MAX_FILE: Final = 400
MAX_PASS: Final = 250
MAX_FUNCTION: Final = 60

_ONE_KERNEL: Final = "one Triton kernel: a helper would take and return a dozen tiles and masks"
# Functions that may be longer, by path in the package and name, and why.
LONG_FUNCTIONS: Final = {
    "kernels/gpu/attention.py:_partials": _ONE_KERNEL,
    "kernels/gpu/select.py:_select_pages": _ONE_KERNEL,
}

_PACKAGE: Final = Path(__file__).resolve().parents[1] / "sparda_compile"


def main(arguments: list[str]) -> int:
    """Check a package, this one if none is named; return the exit code."""
    package = Path(arguments[0]) if arguments else _PACKAGE
    broken = broken_rules(package, {} if arguments else LONG_FUNCTIONS)
    for line in broken:
        print(line)
    return 1 if broken else 0


def broken_rules(package: Path, long_functions: Mapping[str, str]) -> list[str]:
    """Return a line for each rule that is broken.

    Args:
        package: Folder of the package; its name is the one that modules import it by.
        long_functions: Functions that may be longer, `path:name` -> reason; one that is not there,
            or is short, breaks a rule too.
    """
    sources = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
    }
    trees = {path: ast.parse(text, filename=path) for path, text in sources.items()}
    modules = {_module_name(package.name, path): tree for path, tree in trees.items()}
    broken = []
    unused = dict(long_functions)
    for path, tree in trees.items():
        found = [*_long_file(path, sources[path]), *_unformatted(path, sources[path])]
        for node, name in _functions(tree):
            length = _length(node)
            if length <= MAX_FUNCTION:
                continue
            if unused.pop(f"{path}:{name}", None) is None:
                found.append((node.lineno, f"{name} has {length} lines, more than {MAX_FUNCTION}"))
        found += _private(tree, package.name, modules)
        broken += [f"{package.name}/{path}:{line}: {text}" for line, text in sorted(found)]
    broken += [f"{name} is an exception that nothing needs" for name in unused]
    return broken


def _module_name(package: str, path: str) -> str:
    parts = [package, *Path(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _long_file(path: str, text: str) -> Iterator[tuple[int, str]]:
    lines, most = text.count("\n"), MAX_PASS if path.startswith("passes/") else MAX_FILE
    if lines > most:
        yield 1, f"the file has {lines} lines, more than {most}"


def _unformatted(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that keep the formatter off, but for Triton kernels and their launches."""
    if "kernels/gpu/" in path or path.endswith("_kernel.py"):
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.rstrip().endswith("# fmt: skip"):
            yield number, "keeps the formatter off; let it format the line"


def _functions(
    tree: ast.AST, prefix: str = ""
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield each function with its name, that of its class or function before it."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{node.name}."
            if not isinstance(node, ast.ClassDef):
                yield node, f"{prefix}{node.name}"
        yield from _functions(node, inner)


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function from `def` on, without its docstring."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def _private(
    tree: ast.Module, package: str, modules: Mapping[str, ast.Module]
) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each use of what is private to another module."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds a, `import a.b as c` binds a.b.
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and _is_inside(node.module, package):
            source = node.module or ""
            for alias in node.names:
                if f"{source}.{alias.name}" in modules:
                    bound[alias.asname or alias.name] = f"{source}.{alias.name}"
                    is_open = True
                else:
                    is_open = source in modules and alias.name in _exported(modules[source])
                if _is_private(alias.name) or not is_open:
                    yield node.lineno, f"{alias.name} is private to {source}: not in its __all__"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = _module_of(node.value, bound, modules)
            if owner is not None:
                yield node.lineno, f"{node.attr} is private to {owner}"


def _is_inside(module: str | None, package: str) -> bool:
    return module is not None and (module == package or module.startswith(f"{package}."))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _exported(tree: ast.Module) -> set[str]:
    """Return the names in the `__all__` of a module."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value))
    return set()


def _module_of(
    node: ast.expr, bound: Mapping[str, str], modules: Mapping[str, ast.Module]
) -> str | None:
    """Return the module of the package that an expression is, None if it is something else."""
    if isinstance(node, ast.Name):
        name = bound.get(node.id)
    elif isinstance(node, ast.Attribute):
        owner = _module_of(node.value, bound, modules)
        name = None if owner is None else f"{owner}.{node.attr}"
    else:
        name = None
    return name if name in modules else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
