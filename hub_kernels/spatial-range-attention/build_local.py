#!/usr/bin/env python3
# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Build the kernel for this machine with g++ (and nvcc), without kernel-builder or Nix:

    python build_local.py cpu            # or: python build_local.py cuda
    python build_local.py cpu --out DIR  # instead of build/ beside this file

Names, sources and architectures are read from `build.toml`. The result, `build/<variant>/`, is what `kernels` loads:
`kernels.get_local_kernel(Path("build"))`. It runs with the torch it was built against and every newer one, but it is
tied to this machine's C library: builds to publish are made with kernel-builder.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parent

# As kernel-builder writes it: the extension's name is a macro, and `import` finds a module in the library.
REGISTRATION_H = """#pragma once
#include <Python.h>
#define EXTENSION_CONCAT_(a, b) a##b
#define EXTENSION_CONCAT(a, b) EXTENSION_CONCAT_(a, b)
#define EXTENSION_STRING_(a) #a
#define EXTENSION_STRING(a) EXTENSION_STRING_(a)
#define STABLE_TORCH_LIBRARY_EXPAND(name, ops) STABLE_TORCH_LIBRARY(name, ops)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(name, key, ops) STABLE_TORCH_LIBRARY_IMPL(name, key, ops)
#define REGISTER_EXTENSION(name)                                                                               \\
  PyMODINIT_FUNC EXTENSION_CONCAT(PyInit_, name)() {                                                           \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, EXTENSION_STRING(name), nullptr, 0, nullptr};          \\
    return PyModule_Create(&module);                                                                           \\
  }
"""

OPS_PY = '''import torch

from . import {id}


ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's full name, in the namespace of this build."""
    return f"{id}::{{op_name}}"
'''

# Older releases of `kernels` look for the package in a folder of its name.
COMPATIBILITY_PY = '''"""The module one folder up, under the name that older releases of `kernels` import."""

import importlib.util
import sys
from pathlib import Path


if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])

globals().update({{name: getattr(sys.modules["{id}"], name) for name in sys.modules["{id}"].__all__}})
__all__ = list(sys.modules["{id}"].__all__)
'''


PTXAS_INFO = re.compile(r"^ptxas info|bytes stack frame, \d+ bytes spill")


class BuildError(Exception):
    """Something the user can mend; the message says how."""


def find_torch(minimum: str):
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"PyTorch is not installed for {sys.executable}: pip install 'torch>={minimum}'") from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < tuple(int(part) for part in minimum.split(".")):
        raise BuildError(
            f"PyTorch {torch.__version__} is too old, the kernel needs {minimum}: pip install 'torch>={minimum}'"
        )
    return torch


def find_cxx() -> list[str]:
    """The command of the compiler: CXX may hold a launcher or options too."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not (path := shutil.which(command[0])):
        raise BuildError(
            f"The C++ compiler `{command[0]}` was not found: install it (Debian, Ubuntu: apt-get install g++) or name "
            "yours in the environment variable CXX"
        )
    return [path, *command[1:]]


def host_compiler(cxx: list[str]) -> str:
    """The one program of CXX that nvcc may call: behind a launcher, the compiler itself."""
    return next((word for word in reversed(cxx) if not word.startswith("-")), cxx[0])


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if not nvcc.is_file():
        where = f"{home}/bin" if home else "PATH or in /usr/local/cuda/bin"
        raise BuildError(
            f"The CUDA compiler `nvcc` was not found in {where}: install the CUDA toolkit, or name the folder of "
            "yours in the environment variable CUDA_HOME"
        )
    return nvcc


def run(command: list) -> str:
    """Run a command and return what it says; a command that fails ends the build."""
    words = [str(word) for word in command]
    print(shlex.join(words), flush=True)
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    if result.returncode != 0:
        raise BuildError(f"this command failed with status {result.returncode}:\n{shlex.join(words)}\n{result.stdout}")
    return result.stdout


def cuda_release(nvcc: Path, torch) -> str:
    release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
    if release is None:
        raise BuildError(f"{nvcc} does not report its release: is it NVIDIA's compiler driver?")
    wanted = torch.version.cuda
    if wanted and (wanted.split(".")[0] != release[1] or int(wanted.split(".")[1]) < int(release[2])):
        print(
            f"warning: nvcc is of CUDA {release[1]}.{release[2]}, this PyTorch of {wanted}, and will not load the "
            "build: name a toolkit of the same major and no newer minor release in CUDA_HOME",
            file=sys.stderr,
        )
    return release[1] + release[2]


def gencode_flags(capabilities: list[str]) -> list[str]:
    flags = []
    for capability in capabilities:
        number = capability.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if capability.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def resource_report(log: str) -> list[str]:
    """What `ptxas -v` says, one line for each kernel and architecture."""
    kernels, current, memory = [], None, {}
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            current = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            memory = dict(zip(("stack", "stores", "loads"), match.groups()))
        elif current and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append((*current, match[1], shared[1] if shared else "0", memory))
            current, memory = None, {}
    names = {name: name for name, *_ in kernels}
    if names and (filt := shutil.which("cu++filt") or shutil.which("c++filt")):
        result = subprocess.run([filt, "-p", *names], stdout=subprocess.PIPE, text=True, check=False)
        names = dict(zip(names, result.stdout.splitlines())) if result.returncode == 0 else names
    return [
        f"{arch:8} {registers:>4} registers {shared:>6} B shared {memory.get('stack', '?'):>4} B stack "
        f"{memory.get('stores', '?'):>4}/{memory.get('loads', '?')} B spilled/reloaded  {names[name]}"
        for name, arch, registers, shared, memory in sorted(kernels, key=lambda kernel: (kernel[1], names[kernel[0]]))
    ]


def compile_library(
    backend: str, config: dict, torch, cxx: list[str], nvcc: Path | None, identifier: str, folder: Path
) -> Path:
    """Compile the sources side by side, as many at a time as there are cores, and link them."""
    python_include = Path(sysconfig.get_paths()["include"])
    if not (python_include / "Python.h").is_file():
        raise BuildError(f"Python's headers are not in {python_include} (Debian, Ubuntu: apt-get install python3-dev)")
    (folder / "registration.h").write_text(REGISTRATION_H)

    torch_root = Path(torch.__file__).parent
    system = [torch_root / "include", torch_root / "include" / "torch" / "csrc" / "api" / "include", python_include]
    major, minor = (int(part) for part in config["torch"]["stable-abi"][backend].split("."))
    common = ["-O3", "-std=c++20", "-DNDEBUG", "-DPy_LIMITED_API=0x03090000"]
    common += [f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}", f"-DTORCH_EXTENSION_NAME={identifier}"]
    common += [f"-D{backend.upper()}_KERNEL"] + (["-DUSE_CUDA=1"] if nvcc else [])
    common += [f"-I{folder}"] + [f"-I{include}" for include in config["torch"]["include"]]
    common += [word for path in system for word in ("-isystem", path)]
    # No unique symbols: two builds loaded in one process must not share their static variables.
    host = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]

    jobs = len(os.sched_getaffinity(0))
    commands, objects = [], []
    for source in sources(backend, config):
        if source.suffix not in (".cpp", ".cu"):
            continue
        objects.append(folder / f"{source.stem}.o")
        if source.suffix == ".cu":
            component = config["kernel"][f"{config['python_name']}_cuda"]
            device = [
                nvcc,
                "-ccbin",
                host_compiler(cxx),
                "-Xcompiler",
                ",".join(host),
                "--expt-relaxed-constexpr",
                "-Xptxas",
                "-v",
            ]
            device += [f"--threads={jobs}", *gencode_flags(component["cuda-capabilities"])]
            commands.insert(0, [*device, *common, "-c", source, "-o", objects[-1]])  # the slowest first
        else:
            commands.append([*cxx, *host, *common, "-c", source, "-o", objects[-1]])
    with ThreadPoolExecutor(jobs) as pool:
        logs = list(pool.map(run, commands))

    library = folder / f"{identifier}.abi3.so"
    link = [nvcc, "-ccbin", host_compiler(cxx), "-cudart=shared"] if nvcc else cxx
    # All of torch's operators are reached through libtorch: it stays linked though no symbol is its own.
    needed = ["--no-as-needed", "-ltorch", "-ltorch_cpu", "--as-needed"]
    link += ["-shared", *objects, f"-L{torch_root / 'lib'}"] + [word for flag in needed for word in ("-Xlinker", flag)]
    run([*link, "-o", library])

    log = "\n".join(logs)
    remarks = [line for line in log.splitlines() if line.strip() and not PTXAS_INFO.search(line)]
    print(*remarks, *resource_report(log), sep="\n", flush=True)
    return library


def sources(backend: str, config: dict) -> list[Path]:
    """Sources and headers of a variant, as build.toml lists them, relative to this folder."""
    names = list(config["torch"]["src"])
    for component in config["kernel"].values():
        if component["backend"] == backend:
            names += component["src"]
    return [Path(name) for name in names]


def modules(config: dict) -> list[Path]:
    """Python modules of the package, relative to this folder."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "torch-ext" / config["python_name"]).glob("*.py"))


def write_package(folder: Path, backend: str, config: dict, identifier: str, library: Path) -> None:
    """The variant's folder: the Python modules, the library, and what kernel-builder generates beside them."""
    package = config["python_name"]
    folder.mkdir()
    for module in modules(config):
        shutil.copy(ROOT / module, folder)
    shutil.copy(library, folder)
    (folder / "_ops.py").write_text(OPS_PY.format(id=identifier))
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(COMPATIBILITY_PY.format(id=identifier))

    hashes = {
        path.relative_to(folder).as_posix(): hash_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    general = config["general"]
    metadata = {"id": identifier, "name": general["name"], "version": general["version"]}
    metadata |= {"license": general["license"], "python-depends": [], "backend": {"type": backend}}
    metadata |= {"digest": {"algorithm": "sha256", "files": hashes}}
    if backend == "cuda":
        metadata["backend"]["archs"] = config["kernel"][f"{package}_cuda"]["cuda-capabilities"]
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def build(backend: str, out: Path, force: bool) -> Path:
    """Build the variant for this machine and move it to `out`; whatever fails leaves `out` as it was."""
    if platform.system() != "Linux":
        raise BuildError(f"local builds are for Linux, this is {platform.system()}: use kernel-builder")
    config = tomllib.loads((ROOT / "build.toml").read_text())
    package = config["python_name"] = config["general"]["name"].replace("-", "_")
    abi = config["torch"]["stable-abi"][backend]
    inputs = [Path("build.toml"), Path(__file__), *sources(backend, config), *modules(config)]
    for path in inputs:
        if not (ROOT / path).is_file():
            raise BuildError(f"{path} is listed in build.toml, but does not exist in {ROOT}")
    cxx = find_cxx()
    nvcc = find_nvcc() if backend == "cuda" else None
    torch = find_torch(abi)

    fingerprint = hashlib.sha256(f"{torch.__version__} {cxx}".encode())
    for path in inputs:
        fingerprint.update((ROOT / path).read_bytes())
    identifier = f"_{package}_{backend}_{fingerprint.hexdigest()[:12]}"

    compute = "cu" + cuda_release(nvcc, torch) if nvcc else "cpu"
    variant = f"torch-stable-abi{abi.replace('.', '')}-{compute}-{platform.machine()}-linux"
    if not force and is_intact(out / variant, identifier):
        print("up to date, nothing compiled; --force compiles all the same")
        return out / variant
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as objects, tempfile.TemporaryDirectory(dir=out, prefix=".build-") as staging:
        library = compile_library(backend, config, torch, cxx, nvcc, identifier, Path(objects))
        folder = Path(staging, variant)
        write_package(folder, backend, config, identifier, library)
        if backend == "cpu" or torch.version.cuda:
            check_import(folder, identifier)
        if (out / variant).exists():
            (out / variant).rename(Path(staging, "previous"))
        folder.rename(out / variant)
    return out / variant


def hash_of(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def is_intact(folder: Path, identifier: str) -> bool:
    """Whether the folder holds this build, and every file of it as it was written."""
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        hashes = metadata["digest"]["files"]
        return metadata["id"] == identifier and all(hash_of(folder / name) == value for name, value in hashes.items())
    except (OSError, ValueError, KeyError):
        return False


def check_import(folder: Path, identifier: str) -> None:
    """A library with an unresolved symbol links without complaint: load it once, in a process of its own."""
    program = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location({identifier!r}, {str(folder / '__init__.py')!r})\n"
        "module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    run([sys.executable, "-B", "-c", program])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("cpu", "cuda"), help="`cuda` contains the CPU kernels as well")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build", help="folder of the variants (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="build also what is up to date")
    arguments = parser.parse_args()
    try:
        folder = build(arguments.backend, arguments.out.resolve(), arguments.force)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder} is ready: kernels.get_local_kernel(Path({str(folder.parent)!r}))")
    return 0


if __name__ == "__main__":
    sys.exit(main())
