"""What pyproject.toml declares against what the package imports.

    unused      a dependency that nothing imports; of the optional ones, those that are for tools or
                for transformers to import do not count
    missing     an import of neither the standard library, the package nor a declared dependency

Imports under `if TYPE_CHECKING:` do not count: they never run. Prints one line for each; the exit
code is 1 if there is any.

    python tools/dependencies.py [PYPROJECT]
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["broken_dependencies", "main"]

_ROOT: Final = Path(__file__).resolve().parents[1]
# Extras of commands that are run, and of what transformers imports, not the package.
_TOOLS: Final = frozenset({"dev", "docs", "real-model"})


def main(arguments: list[str]) -> int:
    """Check a project, this one if none is named; return the exit code."""
    pyproject = Path(arguments[0]) if arguments else _ROOT / "pyproject.toml"
    broken = broken_dependencies(pyproject)
    for line in broken:
        print(line)
    return 1 if broken else 0


def broken_dependencies(pyproject: Path) -> list[str]:
    """Return a line for each dependency without an import and each import without a dependency.

    Args:
        pyproject: The file; the package is the folder beside it that has the project's name, with
            underscores.
    """
    project: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    package = pyproject.parent / _module(project["name"])
    needed = {_module(line) for line in project.get("dependencies", [])}
    extras = project.get("optional-dependencies", {})
    optional = {_module(x) for name in extras if name not in _TOOLS for x in extras[name]}
    broken, used = [], set()
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        where = path.relative_to(pyproject.parent).as_posix()
        for name, line in _imports(tree):
            used.add(name)
            if name not in {*sys.stdlib_module_names, package.name, *needed, *optional}:
                broken.append(f"{where}:{line}: {name} is imported and not declared")
    broken += [
        f"{name} is declared and not imported" for name in sorted((needed | optional) - used)
    ]
    return broken


def _module(requirement: str) -> str:
    """Return the import name of a requirement: `scikit-x[y]>=1` -> `scikit_x`."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].replace("-", "_").lower()


def _imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the top-level name and the line of each import that may run."""
    if isinstance(node, ast.Import):
        yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module.partition(".")[0], node.lineno
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for child in node.orelse if is_for_types else ast.iter_child_nodes(node):
        yield from _imports(child)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
