"""Where the demo models' training text comes from, and how it becomes plain text.

Five domains, each from a source that may be passed on (NOTICE lists them):

- ``code``: Python's own standard library, from the interpreter that runs this tool;
- ``docs``: the PostgreSQL and SQLite manuals;
- ``man_de``, ``man_fr``, ``man_es``: translated manual pages.

The manuals are Debian packages: they are downloaded with ``apt-get download`` and unpacked in the
work folder, never installed.  A document is a file of the source.
"""

import gzip
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

DOMAINS = ("code", "docs", "man_de", "man_fr", "man_es")
PACKAGES = ("postgresql-doc-15", "sqlite3-doc", "manpages-de", "manpages-fr", "manpages-es", "mandoc")

# Package of a manual in HTML -> its folder, licence and authors.
MANUALS = {
    "postgresql-doc-15": (
        "usr/share/doc/postgresql-doc-15/html",
        "PostgreSQL",
        "PostgreSQL Global Development Group; Regents of the University of California",
    ),
    "sqlite3-doc": ("usr/share/doc/sqlite3", "public domain", "D. Richard Hipp and the SQLite authors"),
}
# Files of the standard library that are data, generated tables or tests rather than code to read.
SKIPPED_CODE = {
    "test", "tests", "idle_test", "encodings", "lib2to3", "site-packages", "pydoc_data", "ensurepip",
    "turtledemo", "msilib", "__pycache__",
}  # fmt: skip
# Sections every translated page ends with: the same words each time, who translated, whom to mail.
BOILERPLATE = re.compile(
    r"^(ÜBERSETZUNG|TRADUCTION|TRADUCCIÓN|COPYRIGHT|KOLOPHON|COLOPHON|COLOFÓN|FEHLER MELDEN|SIGNALER DES BOGUES"
    r"|SIGNALEMENT DE BOGUES|INFORMAR DE ERRORES)$"
)


@dataclass(frozen=True)
class Document:
    """One file of one source.

    ``licence`` is empty where a page's own terms are not certain enough to pass its text on: such a page
    is trained on, never bundled.  ``credit`` names whose work it is.
    """

    domain: str
    source: str
    text: str
    licence: str
    credit: str


def fetch(work: Path) -> None:
    """Download and unpack the Debian packages that are not in the work folder yet."""
    for package in PACKAGES:
        root = work / f"root_{package}"
        if root.exists():
            continue
        debs = work / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
        deb = next(debs.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)


def documents(work: Path) -> Iterator[Document]:
    """Every document of every domain, in a fixed order."""
    yield from python_files()
    for package, (folder, licence, credit) in MANUALS.items():
        yield from html_pages(work, package, folder, licence, credit)
    for language in ("de", "fr", "es"):
        yield from manual_pages(work, language)


def python_files() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        text = path.read_text(encoding="utf-8", errors="replace")
        if SKIPPED_CODE.isdisjoint(name.parts) and len(text) > 400:
            yield Document(
                "code", f"python/{name}", text.expandtabs(), "PSF-2.0", "Python Software Foundation"
            )


class _PageText(HTMLParser):
    """The words of an HTML page; navigation, scripts and drawings left out, ``<pre>`` kept as it stands."""

    SKIP_TAGS = frozenset({"script", "style", "head", "svg", "form"})
    SKIP_CLASSES = ("navheader", "navfooter", "nosearch", "toc")
    BREAKS = frozenset("p div li ul ol dl dt dd table h1 h2 h3 h4 h5 blockquote pre".split())

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.skipping: tuple[str, int] | None = None  # the tag that began the skipped part, and its depth
        self.in_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipping:
            name, depth = self.skipping
            self.skipping = (name, depth + (tag == name))
            return
        classes = (dict(attrs).get("class") or "").split()
        if tag in self.SKIP_TAGS or any(name in self.SKIP_CLASSES for name in classes):
            self.skipping = (tag, 1)
            return
        self.in_pre += tag == "pre"
        if tag in self.BREAKS:
            self.pieces.append("\n\n")
        elif tag in ("br", "tr"):
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append("  ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            name, depth = self.skipping
            depth -= tag == name
            self.skipping = (name, depth) if depth else None
            return
        self.in_pre -= tag == "pre" and self.in_pre > 0
        if tag in self.BREAKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.pieces.append(data if self.in_pre else re.sub(r"\s+", " ", data))


def html_pages(work: Path, package: str, folder: str, licence: str, credit: str) -> Iterator[Document]:
    root = work / f"root_{package}" / folder
    for path in sorted(root.rglob("*.html")):
        # Indexes and cross references are lists of links, not prose.
        if re.search(
            r"crossref|keyword_index|bookindex|requirements|syntaxdiagrams|capi3ref|matrix", path.name
        ):
            continue
        parser = _PageText()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        text = tidy(re.sub(r"\n (?=\S)", "\n", "".join(parser.pieces)))
        if len(text) > 400:
            yield Document("docs", f"{package}/{path.relative_to(root)}", text, licence, credit)


def manual_pages(work: Path, language: str) -> Iterator[Document]:
    mandoc = work / "root_mandoc/usr/bin/mandoc"
    root = work / f"root_manpages-{language}" / f"usr/share/man/{language}"
    for path in sorted(root.rglob("*.gz")):
        source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        if len(source) < 600 or path.is_symlink():
            continue
        command = [str(mandoc), "-T", "utf8", "-O", "width=90,indent=0", str(path)]
        printed = subprocess.run(command, capture_output=True, check=False).stdout.decode(
            "utf-8", errors="replace"
        )
        text = manual_text(re.sub(r".\x08", "", printed))
        if len(text) > 400:
            name = f"manpages-{language}/{path.name.removesuffix('.gz')}"
            comments = [line.lstrip("'.\\\"\t ") for line in source.splitlines() if line[1:3] == '\\"']
            licence = "GPL-3.0-or-later" if gpl_or_later(comments) else ""
            yield Document(f"man_{language}", name, text, licence, credits(comments))


def gpl_or_later(comments: list[str]) -> bool:
    """Whether the page's own header grants the GPL with any later version, as its translation does."""
    header = re.sub(r"\s+", " ", " ".join(comments))
    granted = re.search(r"GPL-[123]\.0-or-later|GNU General Public License.*any later version", header)
    return bool(granted) and "Free Documentation" not in header


def credits(comments: list[str]) -> str:
    """The page's own copyright lines, and who holds those of the translations."""
    lines = [
        line.strip(" ,") for line in comments if re.search(r"copyright.*\d{4}|copyright \(c\)|©", line, re.I)
    ]
    return "; ".join([*lines, "translation: the manpages-l10n translators"])


def manual_text(printed: str) -> str:
    """A printed page without its header and footer lines and its closing boilerplate, indented less."""
    kept, skipping = [], False
    for line in printed.splitlines()[1:-1]:
        if line and not line[0].isspace():
            skipping = bool(BOILERPLATE.match(line.strip()))
        if not skipping:
            # Seven blanks before every line say nothing; two levels are enough to show the structure.
            kept.append(line[5:] if line.startswith("       ") else line)
    return tidy("\n".join(kept))


def tidy(text: str) -> str:
    """Line ends without blanks, never more than one empty line in a row."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
