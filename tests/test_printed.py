# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Every block of README and docs runs as printed and prints what stands below it; scores are scores of the weights."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_examples import run

from transformers_aurea import AureaForConditionalGeneration, embedded_model_path
from transformers_aurea.evaluate_scenes import weights_digest


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "embedded_model"
SCRIPT = ROOT / "docs" / "renew.py"


def load_script():
    spec = importlib.util.spec_from_file_location("renew", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


renew = load_script()
BLOCKS = {page: list(renew.blocks(page.read_text())) for page in renew.PAGES}
SLOW = [page for page, blocks in BLOCKS.items() if any(block.marker == "slow" for block in blocks)]
each_page = pytest.mark.parametrize("page", renew.PAGES, ids=lambda page: page.name)


@each_page
def test_a_page_runs_as_printed(page):
    result = run(SCRIPT, "--check", page)
    assert result.returncode == 0, f"`make renew` writes it anew\n{result.stdout}{result.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.name)
def test_a_page_runs_as_printed_to_its_end(page):
    result = run(SCRIPT, "--check", "--slow", page, seconds=1800)
    assert result.returncode == 0, f"`make renew` writes it anew\n{result.stdout}{result.stderr}"


@each_page
def test_blocks_that_are_not_run_are_told(page):
    """As skipped, so that a run of the tests ends with what it has not tried, and why."""
    runnable = [block for block in BLOCKS[page] if block.language in renew.RUN]
    passed_over = [f"line {block.line} {block.words}" for block in runnable if block.marker == "not run"]
    if passed_over:
        pytest.skip(f"{page.name}: {len(passed_over)} of {len(runnable)} blocks not run: {'; '.join(passed_over)}")


def test_fences_are_all_seen():
    """None is indented or open: what is not found is not run."""
    for page, blocks in BLOCKS.items():
        fences = sum(block.language in (*renew.RUN, *renew.SHOWN) for block in blocks)
        assert page.read_text().count("```") == 2 * fences, page.name


@pytest.mark.parametrize("file", ["scores.json", "drawings.json"])
def test_scores_are_those_of_the_weights_that_are_there(file):
    model = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
    scores = json.loads((RESULTS / file).read_text())
    assert scores.get("all", scores)["weights"] == weights_digest(model), "`make renew` measures them anew"
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] += 1e-3
    assert scores.get("all", scores)["weights"] != weights_digest(model)


class TestRenewing:
    PAGE = """Words.

<!-- file: number.py -->
```python
NUMBER = 1
```

<!-- first: given = 5 -->
```python
import number
print(number.NUMBER + given)
```

<!-- printed by the block above -->
```
old
old
```

```bash
echo here > here.txt; test -f examples/train.py; python -c "print('b  ')"
```

<!-- printed by the block above -->
```
old
```

<!-- printed by: cat here.txt number.py -->
| old |

<!-- not run: it would end all -->
```python
raise SystemExit
```

```text
stays
```

<!-- slow: it takes long -->
```python
print(number.NUMBER)
```

<!-- printed by the block above -->
```
old
```
"""

    @pytest.fixture
    def page(self, tmp_path):
        page = tmp_path / "page.md"
        page.write_text(self.PAGE)
        return page

    def test_blocks_and_tables_are_replaced_and_nothing_else(self, page):
        with renew.checkout():
            text = renew.renewed(page)
        expected = self.PAGE.replace("old\nold", "6").replace("old\n", "b\n", 1)
        assert text == expected.replace("| old |", "here\nNUMBER = 1")

    def test_what_is_slow_is_run_when_asked_for(self, page):
        with renew.checkout():
            assert renew.renewed(page, slow=True).endswith("above -->\n```\n1\n```\n")

    def test_an_error_tells_page_and_line(self, page):
        page.write_text("```python\na = 1\n```\n\n```python\n1 / 0\n```\n")
        result = run(SCRIPT, "--check", page)
        assert result.returncode == 1 and f'File "{page}", line 6, in <module>\n    1 / 0' in result.stderr
        page.write_text("\n```bash\nls nowhere\necho so\n```\n")
        with renew.checkout(), pytest.raises(RuntimeError, match=r"page.md, line 3: status 2 of\nls nowhere"):
            renew.renewed(page)

    def test_a_command_finds_the_repositorys_files(self, page):
        scores = "benchmarks/results/embedded_model/scores.json"
        page.write_text(f"<!-- printed by: python examples/score_tables.py scenes {scores} -->\n| old |\n")
        with renew.checkout():
            table = renew.renewed(page)
        assert "\n| 1,000 unseen scenes | questions |" in table and "\n| color | 966 | " in table

    @pytest.mark.parametrize(
        "block",
        [
            "<!-- not run -->\n```python\n```\n",
            "<!-- not run: -->\n```python\n```\n",
            "<!-- printed by the blok above -->\n```\n```\n",
            "```pyton\n```\n",
        ],
    )
    def test_what_nobody_understands_is_refused(self, block):
        with pytest.raises(ValueError, match=r"^line [23]: "):
            list(renew.blocks(block))

    def test_pictures_are_compared_by_what_they_show(self, page, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(renew, "ROOT", tmp_path)
        for name in renew.CHECKOUT:
            (tmp_path / name).touch()
        page.write_text(
            "```python\nfrom PIL import Image\nImage.new('RGB', (50, 40), 'red').save('a.png')\n```\n"
            "<!-- drawn by the block above -->\n![red](images/a.png)\n"
        )
        picture = tmp_path / "images" / "a.png"
        monkeypatch.setattr(sys, "argv", ["renew.py", str(page)])
        assert renew.main() == 0 and Image.open(picture).getpixel((0, 0)) == (255, 0, 0)
        monkeypatch.setattr(sys, "argv", ["renew.py", "--check", str(page)])
        Image.new("RGB", (60, 40), (253, 1, 0)).save(picture)
        assert renew.main() == 0
        stale = Image.new("RGB", (50, 40), "red")
        stale.paste("blue", (10, 10, 13, 13))  # a patch in another place
        stale.save(picture)
        assert renew.main() == 1 and "images/a.png is drawn otherwise" in capsys.readouterr().out
