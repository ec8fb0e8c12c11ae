# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""README and docs beside their blocks: messages are those that are raised, links lead somewhere."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

import transformers_aurea


ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLANK = "…"  # what a message has in the place of a value
MESSAGES = re.findall(r"^> (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(((?!https?:)[^)]+)\)")
LINKS = [(page, link) for page in PAGES for link in LINK.findall(FENCED.sub("", page.read_text()))]


def texts(source: str) -> list[str]:
    """All that the strings of a source file can say, with `BLANK` where an f-string puts something in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else BLANK for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.fixture(scope="module")
def said() -> list[str]:
    """By the package, and by what loads the code of a folder."""
    files = Path(transformers_aurea.__file__).parent.rglob("*.py")
    sources = [file.read_text() for file in files] + [inspect.getsource(dynamic_module_utils)]
    return [text for source in sources for text in texts(source)]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_troubleshooting_are_said(message, said):
    pattern = re.compile(".*".join(map(re.escape, message.split(BLANK))), re.DOTALL)
    assert any(pattern.search(text) for text in said), message


def test_a_message_that_nobody_says_is_found_out():
    text, *_ = texts('raise ValueError(f"The grid of {grid} patches must be " f"larger than `{name}`.")')
    assert text == "The grid of … patches must be larger than `…`."


def anchor(heading: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name}-{link}" for page, link in LINKS])
def test_links_lead_to_a_file_and_a_heading(page, link):
    path, _, name = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if name:
        assert name in map(anchor, re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE))


def test_every_page_is_on_the_map():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_the_readme_is_short_and_its_pictures_small():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert all(file.stat().st_size <= 150_000 for file in (ROOT / "docs" / "images").iterdir())


class TestNotebook:
    @pytest.fixture(scope="class")
    def cells(self) -> list[dict]:
        notebook = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text())
        return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

    def test_it_is_committed_without_outputs(self, cells):
        assert [cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"]] == []

    @pytest.mark.slow
    def test_it_runs_from_top_to_bottom(self, cells, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        names = {"__name__": "__main__"}
        for cell in cells:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        assert names["seen"].answer == "triangle" and names["right"] >= 8
        light, says = names["lights"][24]
        assert names["ask"](names["again"], light, names["QUESTION"]) == says
        assert f"{names['right']} of 10 right" in capsys.readouterr().out
