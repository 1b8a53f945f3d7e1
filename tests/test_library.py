"""The compiled library: it builds, loads, registers; its ops are right without Python; C++ programs run with it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import resnet_fused as rf
from resnet_fused import backends, extension
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.networks import randomise_norms

pytestmark = pytest.mark.minimum

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "library"
TORCH = Path(torch.__file__).parent

spec = importlib.util.spec_from_file_location("build_ext", ROOT / "build_ext.py")
assert spec is not None and spec.loader is not None
build_ext = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_ext)


@pytest.fixture
def library() -> str:
    """The path of the compiled library; a machine that can build one must have it."""
    reason = build_ext.missing()
    if reason is not None:
        pytest.skip(reason)
    return rf.library_path()


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def call(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


def test_module_and_library_load(library: str) -> None:
    assert extension.missing() is None
    info = extension.module().build_info()
    assert info["abi_target"] == "torch 2.11"
    assert bool(info["cuda"]) == bool(info["architectures"]) == (build_ext.find_nvcc() is not None)
    if info["cuda"]:
        for op in (
            "conv_bn_act",
            "add_relu",
            "add_relu_",
            "relu_backward",
            "batch_norm_act",
            "batch_norm_act_apply",
            "batch_norm_act_backward",
        ):
            assert hasattr(torch.ops.resnet_fused_cuda, op)


def test_library_needs_libtorch_alone(library: str) -> None:
    """No Python, no CUDA driver or runtime: it must load in C++ programs and on machines without a GPU."""
    text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in text.splitlines() if "NEEDED" in line}
    assert {name for name in needed if "torch" in name or "c10" in name} == {
        "libtorch.so", "libtorch_cpu.so", "libc10.so",
    }  # fmt: skip
    assert not [name for name in needed if "cud" in name or "python" in name]


def test_library_is_hardened(library: str) -> None:
    """Its tables are read-only once it is loaded, its functions guard their stacks, and it runs no data."""

    def read(option: str, path: str) -> str:
        return subprocess.run(["readelf", option, "-W", path], capture_output=True, text=True, check=True).stdout

    for path in (library, str(extension.module().__file__)):
        segments = {fields[0]: fields for line in read("-l", path).splitlines() if len(fields := line.split()) > 6}
        assert "GNU_RELRO" in segments
        assert segments["GNU_STACK"][6] == "RW"
        dynamic = read("-d", path)
        assert "BIND_NOW" in dynamic and re.search(r"FLAGS_1.*\bNOW\b", dynamic)
        assert "__stack_chk_fail" in read("--dyn-syms", path)


def test_library_names_no_folder_of_the_machine_that_built_it(library: str) -> None:
    """Messages name sources as "resnet_fused/csrc/…" and "torch/include/…", wherever the library was built."""
    for path in (library, str(extension.module().__file__)):
        texts = re.findall(rb"[ -~]{6,}", Path(path).read_bytes())
        for folder in (ROOT, TORCH.parent, Path(sysconfig.get_path("include")), Path.home()):
            found = [text for text in texts if os.fsencode(folder) + b"/" in text]
            assert not found, found[:5]
    with pytest.raises(RuntimeError, match=r"resnet_fused/csrc/conv_bn_act/cpu\.cpp"):
        torch.ops.resnet_fused_cpu.conv_bn_act(torch.zeros(1), [], [], None, False, torch.zeros(1))


def test_importing_loads_no_compiled_library(library: str) -> None:
    code = (
        "import torch, resnet_fused as rf\n"
        "loaded = lambda: 'libresnet_fused.so' in open('/proc/self/maps').read()\n"
        "before = loaded()\n"
        "rf.resnet20().eval()\n"
        "print(before, loaded(), rf.extension.missing(), loaded())"
    )
    done = python(code)
    assert done.stdout.split() == ["False", "False", "None", "True"], done.stderr


@pytest.mark.parametrize("path", ["rf.library_path()", "str(rf.extension._LIBRARY)"], ids=["asked for", "known"])
def test_loading_after_the_package_changes_nothing(library: str, path: str) -> None:
    code = (
        "import torch, resnet_fused as rf\n"
        f"torch.ops.load_library({path})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(has('resnet_fused::conv_bn_act', 'CPU'), has('resnet_fused::conv_bn_act', 'CompositeExplicitAutograd'))"
    )
    done = python(code)
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert "library_path" not in path or "aoti_torch" not in done.stderr  # torch logs every refused registration


def test_a_library_that_does_not_load_says_so(library: str, tmp_path: Path) -> None:
    package = tmp_path / "resnet_fused"
    shutil.copytree(ROOT / "resnet_fused", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import resnet_fused as rf; print(rf.extension.missing())"
    )
    assert "is not built" in python(code).stdout
    suffix = next(path.name for path in (ROOT / "resnet_fused").glob("_C.*"))
    for name in ("libresnet_fused.so", suffix):
        (package / name).write_bytes(b"not a library")
    said = python(code).stdout
    assert "does not load beside torch" in said and "make ext" in said


def test_compiled_ops(library: str) -> None:
    """Values, strides, NaN, sub-batches, refusals and opcheck of the library's own ops: see library/compiled_ops.py."""
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_ops.py"), library], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["conv_bn_act", "specials", "blocks", "padding_as_wide_as_the_filter", "refusals"]


def test_compiled_ops_on_random_problems(library: str) -> None:
    """The properties of test_properties.py on the library's own ops: see library/compiled_properties.py."""
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_properties.py"), library], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["conv_bn_act"]


def test_a_program_without_python_runs_an_exported_model(library: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise_norms(rf.resnet18(num_classes=10)).eval()
    fused = rf.fuse(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(fused, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        want, exact = model(x), model.double()(x.double())
    executable = str(tmp_path / "run_model")
    include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    link = [
        "-Wl,--no-as-needed",
        f"-L{TORCH / 'lib'}",
        f"-Wl,-rpath,{TORCH / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    call(build_ext.compiler(), "-std=c++20", *include, str(HERE / "run_model.cpp"), "-o", executable, *link)
    (tmp_path / "x.bin").write_bytes(x.numpy().tobytes())
    call(executable, library, package, tmp_path / "x.bin", tmp_path / "y.bin", *x.shape)
    out = torch.frombuffer(bytearray((tmp_path / "y.bin").read_bytes()), dtype=torch.float32).view(want.shape)
    assert_within_budget(out, want, exact, fused(x).detach())


def test_cuda_is_a_backend_that_says_why_it_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends._unavailable.__wrapped__("cuda") == "no CUDA device"


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("8.0", ["-gencode=arch=compute_80,code=sm_80"]),
        ("8.0;9.0+PTX", ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=sm_90",
                         "-gencode=arch=compute_80,code=compute_80"]),
        ("9.0a 8.6", ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_86,code=sm_86"]),
        ("7.5;8.0", ["-gencode=arch=compute_80,code=sm_80"]),
    ],
)  # fmt: skip
def test_architectures(given: str, want: list[str]) -> None:
    assert build_ext.gencode(given) == want


def test_no_gpu_is_asked_for_when_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that builds has none, as a rule; what is compiled must not depend on it."""

    def asked(*args: object, **kwargs: object) -> None:
        raise AssertionError("the build asked for a GPU")

    for name in ("is_available", "device_count", "get_device_capability", "get_arch_list", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    names = build_ext.gencode(build_ext.architecture_list())
    assert {"80", "90"} <= {name.partition("sm_")[2] for name in names}
    assert any("code=compute_" in name for name in names)  # for GPUs to come


@pytest.mark.parametrize("given", ["Hopper", "7.0", "8"])
def test_bad_architectures_are_named(given: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: got"):
        build_ext.gencode(given)


class TestWhatDoesNotCompile:
    """A compiler that refuses: an error with what it said, and no library of an earlier build stays."""

    @pytest.fixture
    def command(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        compiler = tmp_path / "refusing-c++"
        compiler.write_text(
            "#!/bin/sh\ntest \"$1\" = --version && echo 1.0 && exit\necho 'no such macro' >&2; exit 1\n"
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setattr(build_ext, "ROOT", tmp_path)
        monkeypatch.setattr(build_ext, "find_nvcc", lambda: str(compiler))
        monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if shutil.which("ninja") is None:
            pytest.skip("ninja is not on PATH")
        command = build_ext.BuildLibrary(setuptools.Distribution({"ext_modules": build_ext.extensions()}))
        command.ensure_finalized()
        monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / "package" / "_C.so"))
        (tmp_path / "package").mkdir()
        (tmp_path / "build_ext.py").touch()
        for name in ("_C.so", build_ext.LIBRARY):
            (tmp_path / "package" / name).write_text("old")
        return command

    @pytest.mark.parametrize("wanted", ["auto", "cuda"])
    def test_the_build_stops(self, command: Any, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RESNET_FUSED_BUILD", wanted)
        with pytest.raises(SystemExit, match=r"(?s)no such macro.*resnet_fused: \S+\.(cpp|cu)\b.* failed here"):
            command.run()
        assert command.get_outputs() == []
        database = json.loads((build_ext.ROOT / "build" / "compile_commands.json").read_text())
        assert any(entry["file"].endswith("library.cpp") for entry in database)


class TestWhatIsAbsent:
    """A library that is wanted and cannot be built is an error; metadata and an sdist need nothing of it."""

    @pytest.fixture
    def command(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.delenv("RESNET_FUSED_BUILD", raising=False)
        monkeypatch.setattr(build_ext, "find_ninja", lambda: "ninja")
        monkeypatch.setattr(build_ext, "compiler", lambda: "sh")
        monkeypatch.setattr(build_ext, "build", lambda module: pytest.fail("something was built"))
        return build_ext.BuildLibrary(setuptools.Distribution({"ext_modules": build_ext.extensions()}))

    def refused(self, command: Any) -> str:
        command.ensure_finalized()
        with pytest.raises(SystemExit) as raised:
            command.run()
        assert "RESNET_FUSED_BUILD=none" in str(raised.value)
        return str(raised.value)

    def test_no_torch(self, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build_ext, "torch_folder", lambda: None)
        assert "pip install --no-build-isolation ." in self.refused(command)

    def test_no_compiler(self, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build_ext, "compiler", lambda: "no-such-compiler")
        assert "no C++ compiler: no-such-compiler is not on PATH" in self.refused(command)

    def test_no_ninja(self, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build_ext, "find_ninja", lambda: None)
        assert "pip install ninja" in self.refused(command)

    def test_no_nvcc(self, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build_ext, "find_nvcc", lambda: None)
        assert build_ext.without_cuda().startswith("no nvcc")
        monkeypatch.setenv("RESNET_FUSED_BUILD", "cuda")
        assert "no nvcc" in self.refused(command)

    @pytest.mark.parametrize("cuda", ["None", "'12.8'"])
    def test_auto_compiles_no_cuda_that_torch_cannot_use(
        self, cuda: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\n")
        monkeypatch.setattr(build_ext, "torch_folder", lambda: tmp_path)
        monkeypatch.setattr(build_ext, "find_nvcc", lambda: "nvcc")
        monkeypatch.setenv("RESNET_FUSED_BUILD", "auto")
        reason = build_ext.without_cuda()
        assert reason == (
            None if cuda != "None" else "torch 2.13.0 cannot use them (RESNET_FUSED_BUILD=cuda builds them)"
        )
        monkeypatch.setenv("RESNET_FUSED_BUILD", "cuda")
        assert build_ext.without_cuda() is None
        monkeypatch.setenv("RESNET_FUSED_BUILD", "cpu")
        assert build_ext.without_cuda() == "RESNET_FUSED_BUILD=cpu"

    def test_nothing_is_wanted(self, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RESNET_FUSED_BUILD", "none")
        assert build_ext.extensions() == []
        command.extensions = []
        command.run()

    def test_bad_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RESNET_FUSED_BUILD", "yes")
        with pytest.raises(SystemExit, match="RESNET_FUSED_BUILD: got 'yes'"):
            build_ext.extensions()
