# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What README and docs print of the embedded model is what it says, and their scores are scores of its weights."""

import importlib.util
import json
from pathlib import Path

import pytest

from transformers_aurea import AureaForConditionalGeneration, embedded_model_path
from transformers_aurea.evaluate_scenes import weights_digest


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "embedded_model"


def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


renew = script("docs/renew.py")
RUN = {renew.BY_COMMAND: renew.run_command, renew.BY_BLOCK: renew.run_block}


@pytest.mark.parametrize("page", renew.PAGES, ids=lambda page: page.name)
def test_a_page_prints_what_is_printed_now(page):
    text = page.read_text()
    assert renew.renewed(text, RUN) == text, "`make renew` writes it anew"


def test_the_readme_has_such_blocks():
    text = (ROOT / "README.md").read_text()
    assert len(renew.BY_COMMAND.findall(text)) == text.count("<!-- printed by: ") >= 4
    assert len(renew.BY_BLOCK.findall(text)) == text.count("<!-- printed by the block above -->") >= 1


@pytest.mark.parametrize("file", ["scores.json", "drawings.json"])
def test_scores_are_those_of_the_weights_that_are_there(file):
    model = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
    scores = json.loads((RESULTS / file).read_text())
    assert scores.get("all", scores)["weights"] == weights_digest(model), "`make renew` measures them anew"
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] += 1e-3
    assert scores.get("all", scores)["weights"] != weights_digest(model)


class TestRenewing:
    PAGE = """Words.

<!-- printed by: python examples/hello.py -->
```
old
```

<!-- printed by: table -->
| old |

```python
print("a")
```

<!-- printed by the block above -->
```
old
old
```

```
stays
```
"""

    def test_blocks_and_tables_are_replaced_and_nothing_else(self):
        asked = []

        def run(source, folder):
            assert folder.is_dir()
            asked.append(source)
            return f"new {len(asked)}  \nline\n\n"

        text = renew.renewed(self.PAGE, {renew.BY_COMMAND: run, renew.BY_BLOCK: run})
        assert asked == ["python examples/hello.py", "table", 'print("a")\n']
        expected = self.PAGE.replace("old\nold", "new 3\nline").replace("old\n", "new 1\nline\n", 1)
        assert text == expected.replace("| old |", "new 2\nline")

    def test_a_block_is_run(self, tmp_path):
        assert renew.run_block("print(1 + 1)", tmp_path) == "2\n"
        with pytest.raises(RuntimeError, match=r"(?s)python block.py ended with status 1.*ZeroDivisionError"):
            renew.run_block("1 / 0", tmp_path)

    def test_a_command_finds_the_repositorys_files(self, tmp_path):
        scores = "benchmarks/results/embedded_model/scores.json"
        table = renew.run_command(f"python examples/score_tables.py scenes {scores}", tmp_path)
        assert table.startswith("| 1,000 unseen scenes | questions |")
        assert "\n| color | 966 | " in table
