"""Make a corpus of real text from what a machine has: documentation, code, and prose.

    python tools/text_corpus.py --out corpus --mib 30

    corpus/train/DOMAIN/...       to learn from
    corpus/held-out/DOMAIN/...    of sources that no training file is of: long texts, to measure
    corpus/manifest.json          of each file: its source, licence, SHA-256 and bytes

| domain | what |
|---|---|
| documentation | manuals of installed packages, and the docstrings of Python modules |
| code | Python's standard library and the Python packages that are installed |
| prose | licences, release notes and readmes |

A module gives its docstrings or its code, never both. The order of files is that of a hash of their
names, lists of changes last, and one source gives at most a sixth of a domain: so the same machine
gives the same corpus. A text that is the same as another but for white space, or has half of its
paragraphs in others, is left out. Each text keeps the licence of its source, which the manifest
names.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import gzip
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DOMAINS = ("documentation", "code", "prose")
SPLITS = ("held-out", "train")
LEAST_BYTES = 2_000
MOST_BYTES = 256_000
# About 8,192 tokens, and more, and no more of each than is read.
LEAST_HELD_OUT_BYTES = 40_000
MOST_HELD_OUT_BYTES = 64_000
# One source of this many is held out.
HELD_OUT_OF = 5
SOURCES_OF_A_DOMAIN = 6
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "lib2to3", "_vendor"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A file that may become a text: its source, its name there, and how it is read."""

    source: str
    licence: str
    domain: str
    path: Path
    name: str
    kind: str = "text"

    @property
    def digest(self) -> str:
        """A hash of its name."""
        return hashlib.sha256(f"{self.source}/{self.name}".encode()).hexdigest()

    @property
    def order(self) -> tuple[bool, str]:
        """Lists of changes come last: most of them are no sentences."""
        return self.path.name.lower().startswith("changelog"), self.digest

    @property
    def split(self) -> str:
        """`held-out` for one source of five, else `train`."""
        digest = hashlib.sha256(self.source.encode()).hexdigest()
        return "train" if int(digest, 16) % HELD_OUT_OF else "held-out"


def python_files(folder: Path, source: str, licence: str) -> Iterator[Candidate]:
    """Yield the modules of a folder; a hash decides between code and docstrings."""
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder)
        if not SKIPPED_FOLDERS.intersection(inner.parts):
            yield python_file(path, inner.as_posix(), source, licence)


def python_file(path: Path, name: str, source: str, licence: str) -> Candidate:
    """Return a module as code, or as its docstrings: one of three."""
    code = Candidate(source, licence, "code", path, name)
    if int(code.digest, 16) % 3:
        return code
    return dataclasses.replace(code, domain="documentation", kind="docstrings")


def installed_packages() -> Iterator[Candidate]:
    """Yield the modules of the packages that this interpreter has."""
    for package in importlib.metadata.distributions():
        about = package.metadata
        licence = about.get("License-Expression") or about.get("License") or "see its metadata"
        for file in package.files or ():
            if file.suffix == ".py" and not SKIPPED_FOLDERS.intersection(file.parts):
                path = Path(str(package.locate_file(file)))
                yield python_file(path, str(file), about["Name"], licence.splitlines()[0][:80])


def system_documents(root: Path) -> Iterator[Candidate]:
    """Yield what /usr/share has: documents of packages, info pages, manuals of Perl and CMake."""
    for path in sorted((root / "doc").glob("*/**/*")):
        source = path.relative_to(root / "doc").parts[0]
        licence = f"doc/{source}/copyright"
        name = path.relative_to(root).as_posix()
        plain = path.name.removesuffix(".gz").lower()
        if plain.startswith(("copyright", "changelog", "news", "readme", "changes", "history")):
            yield Candidate(source, licence, "prose", path, name)
        elif plain.endswith((".md", ".rst", ".txt")):
            yield Candidate(source, licence, "documentation", path, name)
    for licence_path in sorted((root / "common-licenses").glob("*")):
        yield Candidate("licences", licence_path.name, "prose", licence_path, licence_path.name)
    for pattern, licence in (
        ("info/*.gz", "GFDL, see the page itself"),
        ("perl/**/*.pod", "Artistic or GPL-1+"),
        ("cmake*/Help/**/*.rst", "BSD-3-Clause"),
    ):
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            source = path.name.partition(".")[0] if name.startswith("info/") else name.split("/")[0]
            yield Candidate(source, licence, "documentation", path, name)


def candidates(own: Path) -> Iterator[Candidate]:
    """Yield every file that may become a text."""
    for path in sorted((own / "docs").glob("*.md")):
        yield Candidate("sparda_compile", "Apache-2.0", "documentation", path, path.name)
    yield from python_files(Path(sysconfig.get_paths()["stdlib"]), "python", "PSF-2.0")
    yield from installed_packages()
    yield from system_documents(Path("/usr/share"))


def docstrings(text: str) -> str:
    """Return the docstrings of a module with what they describe, in its order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    found = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            written = ast.get_docstring(node)
            if written:
                found.append(f"{node.name}\n\n{inspect.cleandoc(written)}")
    return "\n\n".join(filter(None, found))


def read(candidate: Candidate) -> str | None:
    """Return a text of a size that is wanted, cut at the end of a line; None for what is none."""
    most = MOST_BYTES if candidate.split == "train" else MOST_HELD_OUT_BYTES
    least = LEAST_BYTES if candidate.split == "train" else LEAST_HELD_OUT_BYTES
    try:
        content = candidate.path.read_bytes()
        if candidate.path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8")
        if candidate.kind == "docstrings":
            text = docstrings(text)
    except (OSError, EOFError, UnicodeError, SyntaxError, ValueError, RecursionError):
        return None
    kept = text.encode()
    if len(kept) > most:
        kept = kept[:most]
        kept = kept[: kept.rfind(b"\n") + 1]
    return None if len(kept) < least or b"\0" in kept else kept.decode("utf-8", "ignore")


class Seen:
    """Texts and paragraphs that were taken."""

    def __init__(self) -> None:
        self.texts: set[bytes] = set()
        self.paragraphs: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Take a text, unless it is one of those, or half of its paragraphs are."""
        whole = hashlib.sha256(" ".join(text.split()).encode()).digest()
        parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
        sizes = {
            hashlib.sha256(part.encode()).digest()[:12]: len(part)
            for part in parts
            if len(part) >= 80
        }
        known = sum(size for digest, size in sizes.items() if digest in self.paragraphs)
        if whole in self.texts or 2 * known > max(sum(sizes.values()), 1):
            return False
        self.texts.add(whole)
        self.paragraphs.update(sizes)
        return True


def choose(
    found: list[Candidate], domain: str, split: str, most_bytes: int, seen: Seen
) -> Iterator[tuple[Candidate, str]]:
    """Yield texts of a domain, in the order of their hashes, until there are enough bytes."""
    taken, by_source = 0, dict[str, int]()
    wanted = (each for each in found if each.domain == domain and each.split == split)
    for candidate in sorted(wanted, key=lambda each: each.order):
        share = by_source.get(candidate.source, 0)
        if taken >= most_bytes:
            return
        if share >= most_bytes / SOURCES_OF_A_DOMAIN:
            continue
        text = read(candidate)
        if text is None or not seen.is_new(text):
            continue
        size = len(text.encode())
        taken, by_source[candidate.source] = taken + size, share + size
        yield candidate, text


def write(out: Path, found: list[Candidate], limits: dict[str, int]) -> list[dict[str, object]]:
    """Write the texts; held-out ones first, so that no training text is like one of them."""
    seen, entries = Seen(), []
    for split in SPLITS:
        for domain in DOMAINS:
            for candidate, text in choose(found, domain, split, limits[split], seen):
                flat = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{candidate.source}/{candidate.name}")
                path = out / split / domain / f"{candidate.digest[:8]}_{flat[-100:]}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                content = text.encode()
                path.write_bytes(content)
                entries.append(
                    {
                        "path": path.relative_to(out).as_posix(),
                        "split": split,
                        "domain": domain,
                        "source": candidate.source,
                        "from": candidate.name,
                        "licence": candidate.licence,
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "bytes": len(content),
                    }
                )
    return entries


def summary(entries: list[dict[str, object]]) -> dict[str, dict[str, int]]:
    """Return files, sources and bytes by split and domain."""
    found: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        for domain in DOMAINS:
            mine = [e for e in entries if (e["split"], e["domain"]) == (split, domain)]
            found[f"{split}/{domain}"] = {
                "files": len(mine),
                "sources": len({e["source"] for e in mine}),
                "bytes": sum(int(str(e["bytes"])) for e in mine),
            }
    return found


def main() -> None:
    """Write a corpus and its manifest, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that is not there yet")
    parser.add_argument("--mib", type=float, default=30.0, help="of each domain, at most")
    parser.add_argument("--held-out-mib", type=float, default=0.8, help="of each domain, at most")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} is there already; name a folder that is not")
    found = [*candidates(Path(__file__).resolve().parents[1])]
    limits = {"train": round(args.mib * 2**20), "held-out": round(args.held_out_mib * 2**20)}
    entries = write(args.out, found, limits)
    names = "".join(sorted(str(entry["sha256"]) for entry in entries))
    manifest = {
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", platform.platform()),
        "python": platform.python_version(),
        "settings": {"mib": args.mib, "held_out_mib": args.held_out_mib},
        "sha256_of_all": hashlib.sha256(names.encode()).hexdigest(),
        "summary": summary(entries),
        "files": entries,
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps(manifest["summary"], indent=1))


if __name__ == "__main__":
    main()
