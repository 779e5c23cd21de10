"""The C library: built once by whoever comes first, done without where it can't be built."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels.native.build as build
import kernels.native.library as library
from kernels.activation import silu_and_mul
from kernels.linear import linear, pack_linear
from kernels.native.library import Operation, native_kernel


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    library._kernels.cache_clear()
    yield
    library._kernels.cache_clear()


def test_without_a_compiler_torch_does_the_work_and_one_line_says_so(without_compiler, caplog):
    x = torch.randn(3, 64).bfloat16()
    weight = torch.randn(5, 64).bfloat16()
    packed = pack_linear(weight)
    assert torch.equal(linear(x, packed), torch.nn.functional.linear(x, weight))
    assert torch.equal(packed.embed(torch.tensor([4])), weight[4:])
    silu_and_mul(x)
    assert [record.getMessage() for record in caplog.records] == [
        "CPU kernels run in torch, which is slower: there is no C compiler (cc, gcc or clang)."
    ]


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no" >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent), prepend=":")
    with pytest.raises(build.BuildError, match=r"cc failed: error: no"):
        build.build_library(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_an_unwritable_cache_is_reported(tmp_path):
    (tmp_path / "cache").write_text("a file in the directory's place")
    with pytest.raises(build.BuildError, match="cache"):
        build.build_library(tmp_path / "cache")


def test_processes_that_start_at_once_share_one_build(tmp_path):
    program = (
        "import sys, ctypes; from pathlib import Path\n"
        "from kernels.native.build import build_library\n"
        "path = build_library(Path(sys.argv[1])); ctypes.CDLL(str(path)); print(path)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=200)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert printed == {str(path) for path in tmp_path.glob("*.so")}
    assert len(printed) == 1
    made = Path(printed.pop()).stat().st_mtime_ns
    assert build.build_library(tmp_path).stat().st_mtime_ns == made


def test_other_devices_have_no_native_kernel():
    assert native_kernel(Operation.RMS_NORM, torch.empty(1, device="meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    """A second one would start a second team of threads on the same cores."""
    assert native_kernel(Operation.RMS_NORM, torch.empty(1)) is not None
    maps = Path("/proc/self/maps").read_text()
    assert "tandem/kernels/kernels-" in maps
    assert len(set(re.findall(r"\S*lib[gi]?omp\S*\.so\S*", maps))) == 1


def test_argument_structures_match_the_sources():
    """Field names and order, as C declares them: a slip would be silent corruption."""
    import kernels.native.arguments as arguments

    source = "".join(path.read_text() for path in Path(build.__file__).parent.glob("*.c"))
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    structures = dict(re.findall(r"struct (\w+_args) \{(.*?)\n\};", source, flags=re.DOTALL))
    python_names = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): structure
        for name, structure in vars(arguments).items()
        if name.endswith("Args")
    }
    assert structures.keys() == python_names.keys()
    for name, body in structures.items():
        declared: list[str] = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            names = re.sub(r"^(const )?\w+ ", "", declaration)
            declared += [field.strip(" *\n") for field in names.split(",")]
        assert declared == [field[0] for field in python_names[name]._fields_], name
