"""Compiles the C kernels for this very machine, once a user, into the cache directory."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

_SOURCE_DIR = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
_COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """The kernels can't be compiled here; the message says why."""


def build_library(cache_dir: Path | None = None) -> Path:
    """The shared library for these sources, this compiler and this CPU; compiled if it's not there.

    Safe to call from several processes at once: one compiles, the others wait for it. Raises
    BuildError.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise BuildError("there is no C compiler (cc, gcc or clang)")
    cache_dir = cache_dir or _user_cache_dir()
    sources = sorted(_SOURCE_DIR.glob("*.c"))
    openmp = _torch_openmp()
    try:
        target = cache_dir / f"kernels-{_key(compiler, sources, openmp)}.so"
        if not target.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock"), timeout=_COMPILE_TIMEOUT_S):
                if not target.exists():
                    _compile(compiler, sources, openmp, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(str(error)) from error
    return target


def _compile(compiler: str, sources: list[Path], openmp: Path | None, target: Path) -> None:
    # Made under another name and renamed: a library of the final name is always whole.
    with tempfile.TemporaryDirectory(dir=target.parent) as work_dir:
        made = Path(work_dir) / target.name
        command = [compiler, *_FLAGS, *map(str, sources), "-o", str(made), "-lm"]
        if openmp is not None:
            # Two OpenMP runtimes in a process would mean two teams of threads on the same cores.
            command[-1:-1] = ["-Wl,--as-needed", str(openmp), f"-Wl,-rpath,{openmp.parent}"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode:
            first_error = next(
                (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()
            )
            raise BuildError(f"{compiler} failed: {first_error}")
        made.replace(target)


def _key(compiler: str, sources: list[Path], openmp: Path | None) -> str:
    """Names everything that the library depends on."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=_COMPILE_TIMEOUT_S, check=True
    ).stdout
    digest = hashlib.blake2b(digest_size=10)
    for part in (compiler, version, *_FLAGS, str(openmp), platform.machine(), _cpu_features()):
        digest.update(part if isinstance(part, bytes) else part.encode())
    for path in (*sources, *sorted(_SOURCE_DIR.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu_features() -> str:
    """What `-march=native` sees: a home directory may be shared by unlike machines."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return platform.processor()
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in cpuinfo.splitlines() if line.startswith(keys)}))


def _torch_openmp() -> Path | None:
    """The GNU OpenMP runtime that torch brings along, if it does."""
    package = Path(torch.__file__).parent
    for directory in (package / "lib", package.parent / "torch.libs"):
        for path in sorted(directory.glob("libgomp*.so*")):
            return path
    return None


def _user_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tandem" / "kernels"
