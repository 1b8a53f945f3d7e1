"""What people read: the code runs, commands and files exist, figures are the CSV's, every message is explained."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optional
import pytest

import resnet_fused as rf
from resnet_fused import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "# Not run by the tests: "  # the first line of a block that needs a GPU, a download or the user's files
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks in these languages, each with the line that it begins at."""
    text = page.read_text()
    return [(text.count("\n", 0, at.start()) + 2, at[2]) for at in FENCE.finditer(text) if at[1] in languages]


def running(page: Path) -> list[tuple[int, str]]:
    return [(line, code) for line, code in blocks(page, "python") if not code.startswith(NOT_RUN)]


@pytest.fixture
def _nothing_registered() -> Iterator[None]:
    yield
    for name in list(rf.registry.names()):
        rf.unregister_backend(name)


@pytest.mark.usefixtures("_nothing_registered", "one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if running(page)], ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optional.torchvision()
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, code in running(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_blocks_that_do_not_run_say_why() -> None:
    for page in PAGES:
        for line, code in blocks(page, "python"):
            if NOT_RUN in code:
                assert re.match(rf"{NOT_RUN}(needs|is) .+\.\n", code), f"{name_of(page)}:{line}"


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """The command lines of a page, without what follows a ``#``."""
    for start, block in blocks(page, "", "bash", "console"):
        for i, line in enumerate(block.splitlines()):
            if words := shlex.split(line, comments=True):
                yield start + i, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for line, words in commands(page):
        where = f"{name_of(page)}:{line}: {' '.join(words)}"
        if "resnet_fused.cli" in words:
            words = ["resnet-fused", *words[words.index("resnet_fused.cli") + 1 :]]
        if words[0] == "resnet-fused" and words[1] != "COMMAND":
            try:
                cli.parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(where)
        elif words[0] == "make":
            target = next(word for word in words[1:] if "=" not in word)
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), where
        elif words[:2] == ["python", "-m"] or words[:2] == ["serve", "run"]:
            optional.needs("ray") if "ray" in words[2] else None
            assert importlib.util.find_spec(words[2].partition(":")[0]) is not None, where
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), where
        elif words[0].startswith(("tools/", ".ci/")):
            assert (ROOT / words[0]).is_file(), where
        for extra in re.findall(r"\[(\w+)\]'?$", " ".join(words)) if words[:2] == ["pip", "install"] else ():
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), where


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:resnet_fused|csrc|tests|tools|bench|docs|examples)/[\w./+-]+)`", text):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path}"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
        assert (page.parent / target).exists(), f"{name_of(page)}: {target}"
    for name in re.findall(r"`resnet_fused\.([\w.]+?)\(?`", text):
        importlib.import_module("resnet_fused")
        parts, value = name.split("."), rf
        for i, part in enumerate(parts):
            if not hasattr(value, part):
                importlib.import_module(".".join(["resnet_fused", *parts[: i + 1]]))
            value = getattr(value, part)


def test_readme_is_short_and_leads_to_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, page.name


def test_figures_are_those_of_the_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    publish = importlib.import_module("publish")
    from resnet_fused.testing.bench import store

    rows, problems = store.read(ROOT / "bench/results/AMD-EPYC-2.13.0+cpu-none.csv")
    contents = publish.contents(store.latest(rows))
    assert not problems
    assert {name_of(path) for path in contents} == {
        "README.md", "docs/benchmarks.md", "docs/images/speed.svg", "docs/images/speed-dark.svg"
    }  # fmt: skip
    for path, text in contents.items():
        assert path.read_text() == text, f"{name_of(path)}: run python bench/plot.py --publish"
    assert "**13.5** (1.94×)" in contents[README]


def test_everything_public_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    words = set(re.findall(r"\w+", text))
    functional = importlib.import_module("resnet_fused.functional")
    assert {*rf.__all__, *functional.__all__} <= words
    for command in cli.COMMANDS:
        assert f"{{{{ help: {command.__name__.rpartition('.')[2]} }}}}" in text


def test_the_site_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    optional.needs("mkdocs", "material", "mkdocstrings_handlers")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    sites = [page.read_text() for page in tmp_path.rglob("*.html")]
    assert len(sites) > 14
    for text in sites:
        assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//", text)
    found = {name for text in sites for name in re.findall(r"id=\"resnet_fused[\w.]*?\.(\w+)\"", text)}
    assert set(rf.__all__) <= found


# --- messages -------------------------------------------------------------------------------------------------------

INTERNAL = {  # raised and caught within the package; what they say ends up in a report, a row or another error
    "Untraceable", "Unguarded", "_Unreadable", "Absent", "KeyError", "AttributeError", "argparse.ArgumentTypeError",
}  # fmt: skip
WARNERS = {"warnings.warn", "logger.warning", "warn_once", "table.warn_once", "complain"}
SELF_EXPLAINING = re.compile(r"\bgot\b.*\bneed\b|\bneed\b.*\bgot\b", re.DOTALL)


def pieces(node: ast.expr) -> list[str]:
    """The constant pieces of a message, of at least two words."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    found = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return [" ".join(piece.split()) for part in found for piece in part.split("%s")]


def messages() -> Iterator[tuple[str, str, ast.expr]]:
    """Where, as what and with which expression something is raised or warned of, in the whole package."""
    for path in (*sorted((ROOT / "resnet_fused").rglob("*.py")), ROOT / "build_ext.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                texts = [a for a in node.exc.args if isinstance(a, ast.JoinedStr | ast.Constant)]
                for text in texts:
                    yield where, ast.unparse(node.exc.func), text
            if isinstance(node, ast.Call) and ast.unparse(node.func) in WARNERS:
                yield where, "warning", node.args[0]


def test_every_message_has_its_remedy() -> None:
    page = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
    lacking = []
    for where, kind, text in messages():
        said = pieces(text)
        whole = " … ".join(said)
        if kind in INTERNAL or isinstance(text, ast.Name) or SELF_EXPLAINING.search(whole) or not said:
            continue
        longest = max(said, key=len).strip(" ,;:.'\"(")
        if len(longest.split()) > 1 and longest not in page:
            lacking.append(f"{where}: {kind}: {longest}")
    assert not lacking, "docs/troubleshooting.md lacks\n" + "\n".join(lacking)


def test_every_error_and_warning_class_is_explained() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    for path in (ROOT / "resnet_fused").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            is_error = any(re.search(r"(Error|Exception|Warning)$", base) for base in bases)
            if is_error and node.name not in INTERNAL:  # type: ignore[attr-defined]
                assert f"`{node.name}`" in page, f"{path}: {node.name}"  # type: ignore[attr-defined]


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RUNS = [(path, ()) for path in EXAMPLES] + [(ROOT / "examples/fine_tune.py", ("--frozen",))]


@pytest.mark.parametrize(
    "script, options", RUNS, ids=lambda value: "".join(value) if isinstance(value, tuple) else value.stem
)
def test_examples_run_offline(script: Path, options: tuple[str, ...], tmp_path: Path) -> None:
    optional.torchvision()
    assert len(script.read_text().splitlines()) <= 60
    argv = [str(script), *options]
    program = f"import runpy, sys; sys.argv = {argv}; runpy.run_path({str(script)!r}, run_name='__main__')"
    compat = "from resnet_fused.testing.torchvision_compat import import_torchvision; import_torchvision()"
    done = subprocess.run(
        [sys.executable, "-c", f"{compat}; {program}"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_examples_take_images(tmp_path: Path) -> None:
    """The way to a user's own data, as far as it needs no download."""
    optional.needs("PIL")
    image = importlib.import_module("PIL.Image")
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.new("RGB", (80, 60), "red").save(tmp_path / name)
    test_examples_run_offline(ROOT / "examples/classify.py", (str(tmp_path / "cats/1.png"),), tmp_path)
    test_examples_run_offline(ROOT / "examples/serve_batch.py", (str(tmp_path / "cats/1.png"),), tmp_path)
    test_examples_run_offline(ROOT / "examples/fine_tune.py", (str(tmp_path), "--steps", "1"), tmp_path)


def test_doctests() -> None:
    for path in (ROOT / "resnet_fused").rglob("*.py"):
        if ">>> " in path.read_text():
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert doctest.testmod(importlib.import_module(name)).failed == 0
