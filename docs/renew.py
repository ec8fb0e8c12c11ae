# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Run the README and the pages beside this file as a reader would, and renew what they print.

    python docs/renew.py [--check] [--slow] [PAGE ...]

The blocks of a page are run one after the other in a folder that looks like a checkout: those of Python in one
namespace, each of bash in a shell. A comment on the line before a block says what else is to be known of it:

    <!-- not run: REASON -->             it is not run
    <!-- slow: REASON -->                it, and what follows on its page, is run with `--slow` alone
    <!-- first: CODE -->                 this Python is run before it: what the reader has, and the folder lacks
    <!-- file: NAME -->                  it is not run but written, for others to read
    <!-- printed by: COMMAND -->         it is what the command prints, fenced or a table
    <!-- printed by the block above -->  it is what the block before it prints, fenced or a table
    <!-- drawn by the block above -->    it is a picture of that name which the block before it writes

`--check` writes nothing and ends with status 1 where a page differs. Tables print scores that were written before:
`make renew` measures them first.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageChops


ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CHECKOUT = ("benchmarks", "docs", "examples", "hub_kernels", "src", "tests", "pyproject.toml")
RUN = ("python", "bash")
SHOWN = ("", "bibtex", "json", "text")
WITH_WORDS = ("not run", "slow", "first", "file", "printed by")
ALONE = ("printed by the block above", "drawn by the block above")
BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>(?:(?!-->)[\s\S])+?) -->\n)?"
    r"(?:^```(?P<language>.*)\n(?P<fenced>(?:(?!```).*\n)*)```\n|(?P<table>(?:^\|.*\n)+)|^!\[.*\]\((?P<picture>.+)\)\n)",
    re.MULTILINE,
)
SHORTCUTS = {"python": '"{python}" "$@"', "aurea": '"{python}" -m transformers_aurea "$@"'}
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Block:
    """A block of a page, what its comment says, and where its content begins and ends in the page's text."""

    language: str
    content: str
    start: int
    end: int
    line: int
    marker: str = ""
    words: str = ""


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks, tables and pictures of a page.

    Raises:
        ValueError: a comment before a block says what nobody understands, or lacks its reason; nobody knows what to do
            with a block of that language.
    """
    for match in BLOCK.finditer(text):
        kind = next(name for name in ("fenced", "table", "picture") if match[name] is not None)
        language = match["language"] if kind == "fenced" else kind
        start, end = match.span(kind)
        block = Block(language, match[kind], start, end, text[:start].count("\n") + 1)
        if language not in (*RUN, *SHOWN, "table", "picture"):
            raise ValueError(f"line {block.line}: a block of {language!r}, not of {', '.join((*RUN, *SHOWN))}")
        if match["comment"] is not None:
            block.marker, _, words = match["comment"].partition(":")
            block.words = words.strip()
            if block.marker not in (WITH_WORDS if block.words else ALONE):
                known = f"{', '.join(ALONE)} or, with words after a colon, {', '.join(WITH_WORDS)}"
                raise ValueError(f"line {block.line}: the comment {match['comment']!r} is none of {known}")
        yield block


@dataclass
class Reader:
    """One who does what a page says, in the current folder."""

    page: Path
    names: dict = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""

    def run_python(self, source: str, line: int) -> str:
        """What it prints. In an error's traceback stand the page and its lines."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * (line - 1) + source, self.page, "exec"), self.names)
        return output.getvalue()

    def run_bash(self, source: str, line: int) -> str:
        with tempfile.TemporaryDirectory() as folder:
            for name, command in SHORTCUTS.items():
                shortcut = Path(folder, name)
                shortcut.write_text(f"#!/bin/sh\nexec {command.format(python=sys.executable)}\n")
                shortcut.chmod(0o755)
            environment = os.environ | QUIET | {"PATH": f"{folder}:{os.environ['PATH']}"}
            command = ["bash", "-euo", "pipefail", "-c", source]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{self.page}, line {line}: status {result.returncode} of\n{source}\n{result.stderr}")
        return result.stdout

    def do(self, block: Block) -> str:
        """What stands in its place now."""
        if block.marker == "printed by":
            return tidied(self.run_bash(block.words, block.line))
        if block.marker == "printed by the block above":
            return tidied(self.printed)
        if block.marker == "drawn by the block above":
            self.take_picture(Path(block.content))
        elif block.marker == "file":
            Path(block.words).write_text(block.content)
        elif block.marker != "not run" and block.language in RUN:
            if block.marker == "first":
                self.run_python(block.words, block.line)
            run = self.run_python if block.language == "python" else self.run_bash
            self.printed = run(block.content, block.line)
        return block.content

    def take_picture(self, path: Path) -> None:
        """Into `drawn`, beside a page's other pictures, what was just drawn."""
        target = Path("drawn", (self.page.parent / path).resolve().relative_to(ROOT))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path.name, target)


def tidied(printed: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())


def renewed(page: Path, slow: bool = False) -> str:
    """A page with what is printed now; done in the current folder. Pictures lie in `drawn`, by path from `ROOT`."""
    text, pieces, end = page.read_text(), [], 0
    reader = Reader(page)
    for block in blocks(text):
        if block.marker == "slow" and not slow:
            break
        pieces += [text[end : block.start], reader.do(block)]
        end = block.end
    return "".join(pieces) + text[end:]


@contextlib.contextmanager
def checkout() -> Iterator[Path]:
    """A folder to work in that looks like a checkout."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in CHECKOUT:
            Path(name).symlink_to(ROOT / name)
        sys.path.insert(0, folder)
        try:
            yield Path(folder)
        finally:
            sys.path.remove(folder)


def looks_alike(one: Path, other: Path) -> bool:
    """Whether two pictures show the same in every place, whatever release of matplotlib drew them."""
    small = [Image.open(path).convert("RGB").resize((96, 96)) for path in (one, other)]
    return max(most for _, most in ImageChops.difference(*small).getextrema()) < 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=lambda page: Path(page).resolve(), default=PAGES, metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page differs")
    parser.add_argument("--slow", action="store_true", help="run blocks that take minutes too")
    args = parser.parse_args()
    os.environ.update(QUIET)
    differs = False
    for page in args.pages:
        with checkout() as folder:
            new = renewed(page, args.slow)
            for picture in (folder / "drawn").rglob("*.png"):
                there = ROOT / picture.relative_to(folder / "drawn")
                if not (there.is_file() and looks_alike(there, picture)):
                    differs = True
                    print(f"{there.relative_to(ROOT)} is drawn otherwise")
                if not args.check:
                    there.parent.mkdir(exist_ok=True)
                    shutil.copy(picture, there)
        text = page.read_text()
        differs |= new != text
        print(
            "".join(difflib.unified_diff(text.splitlines(True), new.splitlines(True), page.name, page.name, n=0)),
            end="",
        )
        if not args.check:
            page.write_text(new)
    return int(args.check and differs)


if __name__ == "__main__":
    sys.exit(main())
