# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Renew what the README and the pages beside this file print.

    python docs/renew.py [--check]

A fenced block or a table below `<!-- printed by: COMMAND -->` is what the command prints; one below
`<!-- printed by the block above -->` is what the Python block before it prints. `--check` writes nothing and ends with
status 1 where a page differs. Tables print scores that were written before: `make renew` measures them first.
"""

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PRINTED = r"(?P<printed>```\n(?:(?!```).*\n)*```\n|(?:\|.*\n)+)"
BY_COMMAND = re.compile(rf"(?P<before><!-- printed by: (?P<source>.+?) -->\n){PRINTED}")
BY_BLOCK = re.compile(
    rf"(?P<before>```python\n(?P<source>(?:(?!```).*\n)*)```\n+<!-- printed by the block above -->\n){PRINTED}"
)


def run_command(command: str, folder: Path) -> str:
    """What a command prints, run in `folder` with the paths of this repository."""
    words = [str(ROOT / word) if (ROOT / word).exists() else word for word in shlex.split(command)]
    if words[0] == "python":
        words[0] = sys.executable
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command} ended with status {result.returncode}:\n{result.stderr}")
    return result.stdout


def run_block(source: str, folder: Path) -> str:
    """What a Python block prints."""
    (folder / "block.py").write_text(source)
    return run_command("python block.py", folder)


def renewed(text: str, run: dict[re.Pattern, Callable[[str, Path], str]]) -> str:
    """A page with what is printed now."""
    with tempfile.TemporaryDirectory() as folder:
        for pattern, runner in run.items():

            def print_anew(match: re.Match, runner=runner) -> str:
                lines = [line.rstrip() for line in runner(match["source"], Path(folder)).strip("\n").splitlines()]
                is_fenced = match["printed"].startswith("```")
                return match["before"] + "\n".join(["```", *lines, "```"] if is_fenced else lines) + "\n"

            text = pattern.sub(print_anew, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page differs")
    args = parser.parse_args()
    differs = False
    for page in PAGES:
        text = page.read_text()
        new = renewed(text, {BY_COMMAND: run_command, BY_BLOCK: run_block})
        differs |= new != text
        name = str(page.relative_to(ROOT))
        print("".join(difflib.unified_diff(text.splitlines(True), new.splitlines(True), name, name, n=0)), end="")
        if not args.check:
            page.write_text(new)
    return int(args.check and differs)


if __name__ == "__main__":
    sys.exit(main())
