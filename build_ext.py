"""How setup.py builds the compiled library: one ninja file, with nvcc where there is one and never asking for a GPU.

Two files come out of it, both beside the Python package: libresnet_fused.so, which needs libtorch alone, for C++
programs as for Python; and _C, the Python module that tells what is in it.

RESNET_FUSED_BUILD says what is wanted: "cpu", "cuda" (with "cpu"), "none" (pure Python on purpose), or "auto" (the
default): "cpu", and "cuda" where nvcc is and torch has CUDA. A library that is wanted and cannot be built is an error,
which says what to run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
LIBRARY = "libresnet_fused.so"
SCHEMAS = ROOT / "resnet_fused" / "ops" / "schemas.py"
ABI_TARGET = (2, 11)  # the oldest torch that loads the library, whichever it was built with
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
OLDEST_ARCHITECTURE = 80
# Files named *_<isa>.cpp are compiled for these instructions, on x86-64 alone; the code asks the CPU before it calls.
INSTRUCTIONS = {
    "avx512bf16": "-mavx512f -mavx512bw -mavx512bf16 -mfma",
    "avx512": "-mavx512f -mfma",
    "avx2": "-mavx2 -mfma",
}


def extensions() -> list[Extension]:
    """What setup() shall build. What is absent is an error in build_ext alone: sdists and metadata need nothing."""
    return [] if mode() == "none" else [Extension("resnet_fused._C", sources=[])]


def mode() -> str:
    value = os.environ.get("RESNET_FUSED_BUILD") or "auto"
    if value not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"resnet_fused: RESNET_FUSED_BUILD: got {value!r}, need 'auto', 'cpu', 'cuda' or 'none'")
    return value


def missing() -> str | None:
    """Why the library cannot be compiled, with the command to run, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux alone, not on {sys.platform}"
    if torch_folder() is None:
        return (
            "this build environment has no torch. Run in an environment that has torch:\n"
            "  pip install 'setuptools>=77' ninja && pip install --no-build-isolation ."
        )
    version = re.match(r"(\d+)\.(\d+)", torch_version())
    if version is None or tuple(map(int, version.groups())) < ABI_TARGET:
        oldest = ".".join(map(str, ABI_TARGET))
        return f"torch is {torch_version()}, it needs {oldest} or newer. Run:\n  pip install 'torch>={oldest}'"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler: {compiler()} is not on PATH. Install one (apt-get install g++), or name one by CXX"
    if find_ninja() is None:
        return "no ninja. Run:\n  pip install ninja"
    if mode() == "cuda" and find_nvcc() is None:
        return "no nvcc (not on PATH, and CUDA_HOME is not set). Without CUDA kernels: RESNET_FUSED_BUILD=cpu"
    return None


def without_cuda() -> str | None:
    """Why the CUDA kernels are left out, or None where they are built."""
    if mode() == "cuda":
        return None
    if mode() == "cpu":
        return "RESNET_FUSED_BUILD=cpu"
    if find_nvcc() is None:
        return "no nvcc (not on PATH, and CUDA_HOME is not set)"
    if not re.search(r"^cuda\b.*= '", _read(f"{torch_folder()}/version.py"), re.MULTILINE):
        return f"torch {torch_version()} cannot use them (RESNET_FUSED_BUILD=cuda builds them)"
    return None


def find_ninja() -> str | None:
    """Also beside this Python: a virtual environment need not be activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def torch_folder() -> Path | None:
    """The folder of torch, found without importing it."""
    for entry in sys.path:
        folder = Path(entry or ".") / "torch"
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return folder.resolve()
    return None


def torch_version() -> str:
    return _read(f"{torch_folder()}/version.py").partition("__version__ = '")[2].partition("'")[0]


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def gencode(architectures: str) -> list[str]:
    """nvcc's options for a list like "8.0;9.0+PTX". All plain architectures are compiled from the oldest one's PTX."""
    names = []
    for entry in architectures.replace(" ", ";").split(";"):
        if not entry:
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"resnet_fused: TORCH_CUDA_ARCH_LIST: got {entry!r}, need entries like 8.0, 9.0a or 9.0+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) < OLDEST_ARCHITECTURE:
            print(f"resnet_fused: {entry} is left out: the kernels need 8.0", file=sys.stderr)
            continue
        names.append((int(major + minor), suffix, bool(ptx)))
    if not names:
        raise SystemExit(f"resnet_fused: TORCH_CUDA_ARCH_LIST: got {architectures!r}, need one of at least 8.0")
    plain = sorted(number for number, suffix, _ in names if not suffix)
    options = [
        f"-gencode=arch=compute_{f'{number}{suffix}' if suffix else plain[0]},code=sm_{number}{suffix}"
        for number, suffix, _ in names
    ]
    if plain and any(ptx for *_, ptx in names):
        options.append(f"-gencode=arch=compute_{plain[0]},code=compute_{plain[0]}")
    return options


class BuildLibrary(build_ext):
    """setuptools' build_ext, by ninja."""

    def run(self) -> None:
        if not self.extensions:
            return
        reason = missing()
        if reason is not None:
            raise SystemExit(
                f"resnet_fused: the compiled library cannot be built: {reason}\n"
                "Or without the library, which is slower: RESNET_FUSED_BUILD=none"
            )
        module = Path(self.get_ext_fullpath("resnet_fused._C")).resolve()  # ninja runs elsewhere
        module.parent.mkdir(parents=True, exist_ok=True)
        try:
            build(module)
        except BuildError as error:
            for path in self.get_outputs():  # of an earlier build: they are not what the sources say
                Path(path).unlink()
            raise SystemExit(f"{error}\nresnet_fused: {error.what}; the compiler's words are above") from None

    def get_outputs(self) -> list[str]:
        module = Path(self.get_ext_fullpath("resnet_fused._C"))
        return [str(path) for path in (module, module.parent / LIBRARY) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]


class BuildError(Exception):
    """The compiler refused; the text is what it said."""

    @property
    def what(self) -> str:
        """The files that do not compile, in a line."""
        failed = re.findall(r"^FAILED: (?:\[code=\d+\] )?(\S+)", str(self), re.MULTILINE)
        names = [name.removesuffix(".o") for name in failed] or ["ninja"]
        return f"{', '.join(names)} failed here"


def build(module: Path) -> None:
    """Build ``module`` and libresnet_fused.so beside it; what has not changed is not compiled again.

    Each torch has a folder of its own under build/, so that environments that share a checkout do not mix objects.

    Raises:
        BuildError: something does not compile.
    """
    left_out = without_cuda()
    nvcc = None if left_out else find_nvcc()
    if left_out:
        print(f"resnet_fused: no CUDA kernels: {left_out}", file=sys.stderr)
    folder = ROOT / "build" / f"ext-{sysconfig.get_config_var('SOABI')}-torch-{torch_version()}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "schemas.h", _schemas_header())
    _write(folder / "build_info.h", _build_info_header(nvcc, left_out))
    _write(folder / "build.ninja", _ninja(folder / module.name, nvcc))
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    ninja = [find_ninja() or "ninja", "-C", str(folder)]
    commands = subprocess.check_output([*ninja, "-t", "compdb", "cxx", "nvcc"], text=True)
    _write(ROOT / "build" / "compile_commands.json", commands)  # for clangd and its like
    done = subprocess.run([*ninja, "-j", jobs, "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(done.stdout)
    for name in (module.name, LIBRARY):
        _install(folder / name, module.parent / name)


def _install(built: Path, target: Path) -> None:
    """Copy what is new, by renaming: a process that has the old file loaded keeps it."""
    if not target.exists() or (built.stat().st_mtime_ns, built.stat().st_size) != (
        target.stat().st_mtime_ns, target.stat().st_size,
    ):  # fmt: skip
        part = target.with_name(f".{target.name}.new")
        shutil.copy2(built, part)
        part.replace(target)


def _write(path: Path, text: str) -> None:
    """Write only what is new, so that ninja sees no change where there is none."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _schemas_header() -> str:
    schemas = runpy.run_path(str(SCHEMAS))["SCHEMAS"]
    lines = [f'    "{name}{schema}",' for name, schema in schemas.items()]
    return "\n".join(
        ["// Written from resnet_fused/ops/schemas.py.", "constexpr const char* kSchemas[] = {", *lines, "};", ""]
    )


def architecture_list() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES


def _build_info_header(nvcc: str | None, left_out: str | None) -> str:
    cuda = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True)) if nvcc else None
    rows = {
        "abi_target": f"torch {'.'.join(map(str, ABI_TARGET))}",
        "torch": torch_version(),
        "compiler": subprocess.check_output([compiler(), "--version"], text=True).splitlines()[0],
        "cuda": cuda[1] if cuda else "",
        "architectures": architecture_list() if nvcc else "",
        "left_out": f"CUDA kernels: {left_out}" if left_out else "",
    }
    lines = [f"    {{{json.dumps(key)}, {json.dumps(value)}}}," for key, value in rows.items()]
    return "\n".join(["constexpr const char* kBuildInfo[][2] = {", *lines, "};", ""])


def _ninja(module: Path, nvcc: str | None) -> str:
    torch = torch_folder()
    assert torch is not None
    library = module.parent / LIBRARY
    target = "0x" + "".join(f"{part:02x}" for part in ABI_TARGET) + "0" * 12
    common = f"-std=c++20 -O3 -DTORCH_TARGET_VERSION={target} -I{CSRC} -I. -isystem {torch}/include"
    # What __FILE__ says in messages must not tell where it was built, and be the same wherever that was.
    python = sysconfig.get_path("include")
    names = {python: "python", torch: "torch", ROOT: "resnet_fused"}
    prefixes = [f"-ffile-prefix-map={folder}={name}" for folder, name in names.items()]
    hardened = ["-fPIC", "-fvisibility=hidden", "-fstack-protector-strong", *prefixes]
    strict = ["-Wall", "-Wextra", "-Werror"]
    lines = [
        f"cxx = {compiler()}",
        f"nvcc = {nvcc}",
        f"common = {common}",
        f"cxxflags = {' '.join([*hardened, *strict])}{' -DRF_CUDA' if nvcc else ''}",
        f"cudaflags = -Xcompiler={','.join([*hardened, *strict])} -Werror=all-warnings -Xptxas=-v "
        f"{' '.join(gencode(architecture_list()))}",
        "rule cxx",
        "  command = $cxx $common $cxxflags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        "  command = $nvcc $common $cudaflags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
        "{ cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule resources",
        f"  command = {sys.executable} {ROOT / 'build_ext.py'} $out $in",
        "rule link",
        "  command = $linker -shared $in -o $out $flags",
    ]
    objects, logs = [], []
    for source in sorted([*CSRC.rglob("*.cpp"), *(CSRC.rglob("*.cu") if nvcc else ())]):
        if source.name == "module.cpp" or (nvcc is None and source.name == "cuda.cpp"):
            continue
        isa = next((isa for isa in INSTRUCTIONS if source.stem.endswith(f"_{isa}")), None)
        if isa and platform.machine() != "x86_64":
            continue
        name = str(source.relative_to(CSRC)).replace("/", ".") + ".o"
        objects.append(name)
        if source.suffix == ".cu":
            logs.append(f"{name}.log")
            lines.append(f"build {name} | {name}.log: nvcc {source}")
        else:
            generated = " | schemas.h" if "schemas.h" in source.read_text() else ""
            lines.append(f"build {name}: cxx {source}{generated}")
            if isa:
                lines.append(f"  more = {INSTRUCTIONS[isa]}")
    # libtorch.so is kept although it has no symbol of use: in a CUDA build of torch it brings libtorch_cuda, where the
    # weak symbols are found.
    options = ("-soname,libresnet_fused.so", "--no-as-needed", "--exclude-libs,ALL", "-z,defs")
    lines += [
        f"build resources.h: resources {' '.join(logs)} | {ROOT / 'build_ext.py'}",
        f"build module.o: cxx {CSRC / 'module.cpp'} | resources.h build_info.h",
        # pybind11 of torch 2.11 refuses to be included for the stable ABI, which this file has no use for.
        f"  more = -UTORCH_TARGET_VERSION -isystem {python}",
        f"build {library}: link {' '.join(objects)}",
        # No device code waits to be linked, and nvcc would write this machine's folders into what it links.
        f"  linker = {'$nvcc -cudart=static -nodlink' if nvcc else '$cxx'}",
        f"  flags = {_linker_options(*options, by_nvcc=nvcc is not None)} -L{torch}/lib -ltorch -ltorch_cpu -lc10",
        f"build {module}: link module.o | {library}",
        "  linker = $cxx",
        f"  flags = {_linker_options('--no-as-needed')} -L{module.parent} -lresnet_fused -Wl,-rpath,'$$ORIGIN'",
        "",
    ]
    return "\n".join(lines)


def _linker_options(*options: str, by_nvcc: bool = False) -> str:
    """These, and full RELRO: every symbol is found as the library loads, and its tables are read-only from then on."""
    options = (*options, "-z,relro", "-z,now")
    return " ".join(f"-Xlinker={option}" if by_nvcc else f"-Wl,{option}" for option in options)


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def resources_header(logs: list[str]) -> str:
    """The compiler's report on every kernel, as rows {symbol, architecture, registers, stack, spill, shared}."""
    rows = []
    entry, stack, spill = ("", ""), 0, 0
    for line in "".join(map(_read, logs)).splitlines():
        if match := _ENTRY.search(line):
            entry = (match[1], match[2])
        elif match := _STACK.search(line):
            stack, spill = int(match[1]), int(match[2]) + int(match[3])
        elif match := _USED.search(line):
            rows.append(f'    {{"{entry[0]}", "{entry[1]}", {match[1]}, {stack}, {spill}, {match[2] or 0}}},')
    return "\n".join(
        ["// Written from what the compiler reported.", "const Resources kResources[] = {", *rows, "};", ""]
    )


def _read(path: str) -> str:
    return Path(path).read_text()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(resources_header(sys.argv[2:]))
