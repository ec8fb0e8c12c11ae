# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A fusion of one's own travels with the model: its file goes into the saved folder, and is loaded from it.

my_fusion.py ─ imports made flat ─► folder/my_fusion.py,  config.json: auto_map.AureaFusion = my_fusion.MyFusion
"""

import ast
import os
import sys
from importlib import import_module
from pathlib import Path

from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .fusion_aurea import FUSIONS, AureaFusion, register_fusion


_PACKAGE = "transformers_aurea"


def is_remote_code(cls: type) -> bool:
    """Whether a class is code of a folder or repository that was trusted."""
    return cls.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def is_own_fusion(fusion_class: type[AureaFusion]) -> bool:
    """Whether a fusion is none of those of `fusion_aurea`."""
    return fusion_class.__module__ != AureaFusion.__module__


def save_own_fusion(fusion_class: type[AureaFusion], save_directory: str | os.PathLike) -> str:
    """Copies the file of a fusion, and those beside it that it imports, into a folder → `"file.Class"`.

    Raises:
        ValueError: the class has no file of its own, or its file imports what does not travel, or is the copy itself.
    """
    name, module = fusion_class.__qualname__, fusion_class.__module__
    path = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    is_in_file = module != "__main__" and path.suffix == ".py" and path.stem != "__init__" and "." not in name
    if not is_in_file or path.stem.endswith("_aurea"):  # names of ours
        raise ValueError(
            f"The fusion {module}.{name} cannot be saved with the model: put the class into a file of its own, say "
            "my_fusion.py, at its top level, and import it."
        )
    files, left = {}, [path]
    while left:
        file = left.pop()
        files[file], beside = _flatten(file)
        left += [other for other in beside if other not in files]
    copies = {Path(save_directory, file.name): (file, text) for file, text in files.items()}
    for copy, (file, _) in copies.items():
        if copy.exists() and copy.samefile(file):
            raise ValueError(f"{file} would be overwritten by its copy: save the model to another folder.")
    for copy, (_, text) in copies.items():
        copy.write_bytes(text)
    return f"{path.stem}.{name}"


def load_own_fusion(config_dict: dict, pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs) -> None:
    """Registers the fusion that a trusted folder or repository brings, if it brings one, by running its code.

    Raises:
        ValueError: another folder's fusion has the name.
    """
    name, reference = _own_fusion(config_dict)
    known = FUSIONS.get(name)
    if reference is None or (known is not None and not is_remote_code(known)):  # the user's own goes first
        return
    fusion_class = get_class_from_dynamic_module(reference, pretrained_model_name_or_path, **hub_kwargs)
    if known is None:
        register_fusion(name, fusion_class)
    elif _sources(known) != _sources(fusion_class):
        raise ValueError(
            f"The fusion {name!r} is {known.__module__}.{known.__qualname__} already, and the code of "
            f"{pretrained_model_name_or_path} differs: load it in a process of its own."
        )


def check_own_fusion(config_dict: dict) -> None:
    """ValueError if the fusion is code of the folder that nobody has imported or trusted."""
    name, reference = _own_fusion(config_dict)
    if reference is not None and name not in FUSIONS:
        raise ValueError(
            f"The fusion {name!r} is code beside this configuration, in {reference.rpartition('.')[0]}.py, which has "
            "not run. Import the file that registers it first. Or, if you trust that code, run it: by "
            "`AureaConfig.from_pretrained(folder, trust_remote_code=True)` before you load the model, or, where "
            f"{_PACKAGE} is not imported, by an Auto class with `trust_remote_code=True`."
        )


def _own_fusion(config_dict: dict) -> tuple[str | None, str | None]:
    """The names of the fusion and, if it is someone's own, of its class in the folder."""
    name = (config_dict.get("feature_fusion_config") or {}).get("fusion_type")
    return name, (config_dict.get("auto_map") or {}).get("AureaFusion")


def _sources(cls: type) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in _with_imported_files(Path(sys.modules[cls.__module__].__file__))}


def _with_imported_files(path: Path) -> set[Path]:
    """A file, and all beside it that it imports by relative names, these and what they import."""
    files, left = set(), [path]
    while left:
        file = left.pop()
        files.add(file)
        nodes = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.ImportFrom)]
        names = {node.module for node in nodes if node.level == 1}
        left += {file.with_name(f"{name}.py") for name in names} - files
    return files


def _flatten(path: Path) -> tuple[bytes, list[Path]]:
    """The text of a file with relative imports of ours and of files beside it, and these files.

    Raises:
        ValueError: an import cannot be made so.
    """
    # In every folder is the configuration's code, with all that it imports.
    configuration = Path(__file__).with_name("configuration_aurea.py")
    ours = {file.stem for file in _with_imported_files(configuration)}
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True)
    imports = [node for node in ast.walk(ast.parse(b"".join(lines))) if isinstance(node, (ast.Import, ast.ImportFrom))]
    beside = []
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        names = _imported(node, path)
        first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
        before, after = first[: node.col_offset], last[node.end_col_offset :]
        others = {path.with_name(f"{module}.py") for module in names if not module.endswith("_aurea")}
        is_alone = not before.strip() and not after.split(b"#")[0].strip()
        travels = ours.issuperset(module for module in names if module.endswith("_aurea"))
        if names and not (is_alone and travels and all(file.is_file() for file in others)):
            raise ValueError(
                f"{path}, line {node.lineno}: `{ast.unparse(node)}` cannot be saved with the model. Of {_PACKAGE}, "
                f"write `from {_PACKAGE}.fusion_aurea import …`, on a line of its own ({', '.join(sorted(ours))} "
                "travel); of other files, `from name import …` or `from .name import …`, with name.py beside it."
            )
        beside += others
        if names and node.level == 0:
            flat = (ast.unparse(ast.ImportFrom(module, aliases, 1)).encode() for module, aliases in names.items())
            lines[node.lineno - 1 : node.end_lineno] = [before + (b"\n" + before).join(flat) + after]
    return b"".join(lines), beside


def _imported(node: ast.Import | ast.ImportFrom, path: Path) -> dict[str, list[ast.alias]]:
    """What an import takes from files of ours, or beside `path`, by their names; nothing if it is a library's."""
    if isinstance(node, ast.Import):
        roots = {alias.name.split(".")[0] for alias in node.names}
        is_local = bool(roots & {_PACKAGE, _package_of(path)})
        is_local = is_local or any(path.with_name(f"{root}.py").is_file() for root in roots)
        return {".": node.names} if is_local else {}  # there is no relative `import`
    if node.level == 0 and node.module == _PACKAGE:
        names = {}
        for alias in node.names:
            module = getattr(getattr(import_module(_PACKAGE), alias.name, None), "__module__", "")
            names.setdefault(_flat_name(module), []).append(alias)
        return names
    if node.level == 0 and node.module.startswith(f"{_PACKAGE}."):
        return {_flat_name(node.module): node.names}
    if node.level == 0 and node.module.split(".")[0] == _package_of(path):
        return {f".{node.module}": node.names}  # by its full name, which there is nowhere else
    if node.level == 0:
        return {node.module: node.names} if path.with_name(f"{node.module}.py").is_file() else {}
    return {"." * (node.level - 1) + (node.module or ""): node.names}


def _package_of(path: Path) -> str | None:
    """The name of the outermost package that a file is in, if any."""
    folders = []
    while (path := path.parent).joinpath("__init__.py").is_file():
        folders.append(path.name)
    return folders[-1] if folders else None


def _flat_name(module: str) -> str:
    """Of a module of ours, the name that it has in a folder; all others keep theirs, with dots, which no file has."""
    return module.removeprefix(f"{_PACKAGE}.") if module.endswith("_aurea") else module


__all__ = ["check_own_fusion", "is_own_fusion", "is_remote_code", "load_own_fusion", "save_own_fusion"]
