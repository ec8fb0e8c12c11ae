# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Where the command `aurea` begins: in `transformers_aurea.cli`, without the package around it.

Importing the package registers its classes with transformers, which takes torch, and seconds. `aurea --help` and wrong
usage need neither; a sub-command imports the package once it runs.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> int:
    folder = Path(find_spec("transformers_aurea").origin).parent / "cli"
    spec = spec_from_file_location(
        "transformers_aurea.cli", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    cli = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.run_command()
