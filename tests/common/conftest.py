# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""transformers' own common tests, run on Aurea and, to compare, on LLaVA: `make common`.

The mixins are those of the transformers that is installed: pip fetches its source distribution once, into pytest's
cache. None of their code is in this repository; what is here are the testers, which say what to build.

A run lists what Aurea skips, by reason, and fails if LLaVA runs any of it. Left out is the pipeline mixin: its tests
are not in the source distribution, and want models from the Hub.
"""

import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import transformers


PICTURE = Path(__file__).resolve().parent.parent / "fixtures" / "image_rgb.png"
NO_SDIST = 3  # exit status

# What the mixins import and the source distribution lacks.
STAND_INS = {
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {
        "url_to_local_path": lambda url: str(PICTURE) if url.endswith((".jpg", ".png")) else url
    },
}


def fetch_tests(cache: Path) -> Path:
    """The folder `tests` of the installed transformers' source distribution, unpacked in `cache`."""
    name = f"transformers-{transformers.__version__}"
    tests = cache / name / "tests"
    if not tests.exists():
        pip_download = [sys.executable, "-m", "pip", "download", "--dest", cache, "--no-deps"]
        command = [*pip_download, "--no-binary", "transformers", name.replace("-", "==")]
        download = subprocess.run(command, capture_output=True, text=True)
        if download.returncode:
            pytest.exit(f"pip cannot fetch the source distribution of {name}:\n{download.stderr}", NO_SDIST)
        with tarfile.open(cache / f"{name}.tar.gz") as sdist:
            sdist.extractall(cache / "unpacked", filter="data")
        (cache / "unpacked" / name / "tests" / "__init__.py").touch()  # one of the mixins reads it
        shutil.move(cache / "unpacked" / name, cache / name)
    return tests


def pytest_configure(config):
    tests = fetch_tests(config.cache.mkdir("sdist"))
    for name, content in {"tests": {"__path__": [str(tests)]}, **STAND_INS}.items():
        package = name.rpartition(".")[0]
        if package:
            sys.modules.setdefault(package, ModuleType(package))
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")


def outcomes(reporter, kinds: tuple[str, ...], model: str) -> dict[str, str]:
    """Tests of a model that ended so, and why, by the name that they have for every model."""
    reports = [report for kind in kinds for report in reporter.stats.get(kind, ())]
    found = {}
    for report in reports:
        _, test_class, test = report.nodeid.split("::")
        if test_class.startswith(model):
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
            found[f"{test_class.removeprefix(model)}::{test}"] = reason
    return found


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several processes
        return
    skipped = outcomes(reporter, ("skipped", "subtests skipped"), "Aurea")
    run_by_llava = outcomes(reporter, ("passed", "failed"), "Llava").keys()
    run_by_llava -= outcomes(reporter, ("skipped", "subtests skipped"), "Llava").keys()
    tests_by_reason = defaultdict(list)
    for name, reason in sorted(skipped.items()):
        tests_by_reason[reason].append(name.partition("::")[2])
    reporter.section("skipped for Aurea")
    for reason, names in sorted(tests_by_reason.items()):
        reporter.line(f"{reason}: {', '.join(names)}")
    wrongly = sorted(skipped.keys() & run_by_llava)
    if wrongly:
        reporter.line(f"LLaVA runs of these: {', '.join(wrongly)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
