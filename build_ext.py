"""How setup.py builds the compiled library: one ninja file, with nvcc where there is one and never asking for a GPU.

Two files come out of it, both beside the Python package: libresnet_fused.so, which needs libtorch alone, for C++
programs as for Python; and _C, the Python module that tells what is in it. RESNET_FUSED_CUDA says what is built: "0"
nothing, "auto" (the default) what can be built here, "1" everything, where anything absent is an error.
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
    """What setup() shall build: nothing, after one line that says why, where it is not wanted or cannot be done."""
    if mode() == "0":
        return []
    reason = missing()
    if reason is None:
        return [Extension("resnet_fused._C", sources=[])]
    complain(f"no compiled library: {reason}; everything else works")
    return []


def mode() -> str:
    value = os.environ.get("RESNET_FUSED_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"resnet_fused: RESNET_FUSED_CUDA: got {value!r}, need 'auto', '0' or '1'")
    return value


def complain(line: str) -> None:
    """Print the line, or stop with it where everything was asked for."""
    if mode() == "1":
        raise SystemExit(f"resnet_fused: {line} (RESNET_FUSED_CUDA=1)")
    print(f"resnet_fused: {line}", file=sys.stderr)


def missing() -> str | None:
    """Why nothing can be compiled, or None."""
    if sys.platform != "linux":
        return "it is built on Linux alone"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler ({compiler()} is not on PATH)"
    if shutil.which("ninja") is None:
        return "ninja is not on PATH (pip install ninja)"
    torch = torch_folder()
    if torch is None:
        return "no torch headers in this build environment (pip install --no-build-isolation, beside torch)"
    version = re.match(r"(\d+)\.(\d+)", torch_version())
    if version is None or tuple(map(int, version.groups())) < ABI_TARGET:
        return f"torch is older than {'.'.join(map(str, ABI_TARGET))}"
    return None


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
    folder = torch_folder()
    assert folder is not None
    return (folder / "version.py").read_text().partition("__version__ = '")[2].partition("'")[0]


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
        module = Path(self.get_ext_fullpath("resnet_fused._C")).resolve()  # ninja runs elsewhere
        module.parent.mkdir(parents=True, exist_ok=True)
        try:
            build(module)
        except BuildError as error:
            for path in self.get_outputs():  # of an earlier build: they are not what the sources say
                Path(path).unlink()
            print(error, file=sys.stderr)
            complain(f"NO COMPILED LIBRARY: {error.what}; the compiler's words are above; everything else works")

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
    nvcc = find_nvcc()
    if nvcc is None:
        complain("no nvcc (not on PATH, and CUDA_HOME is not set): the library is built without its CUDA kernels")
    folder = ROOT / "build" / f"ext-{sysconfig.get_config_var('SOABI')}-torch-{torch_version()}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "schemas.h", _schemas_header())
    _write(folder / "build_info.h", _build_info_header(nvcc))
    _write(folder / "build.ninja", _ninja(folder / module.name, nvcc))
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    ninja = ["ninja", "-C", str(folder), "-j", jobs, "--quiet"]
    done = subprocess.run(ninja, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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


def _build_info_header(nvcc: str | None) -> str:
    cuda = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True)) if nvcc else None
    rows = {
        "abi_target": f"torch {'.'.join(map(str, ABI_TARGET))}",
        "torch": torch_version(),
        "compiler": subprocess.check_output([compiler(), "--version"], text=True).splitlines()[0],
        "cuda": cuda[1] if cuda else "",
        "architectures": architecture_list() if nvcc else "",
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
