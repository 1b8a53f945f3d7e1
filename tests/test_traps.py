"""The list of traps in traps.py is whole: its tests exist, and so do the rules that it takes out."""

import ast
from pathlib import Path

import pytest
from traps import MODELS, ROOT, TRAPS

ALL = (*TRAPS, *MODELS)


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("found", ALL, ids=lambda found: found.case)
def test_its_tests_exist(found):
    assert found.tests.split()
    for name in found.tests.split():
        file, _, function = name.partition("::")
        assert function in functions(ROOT / "tests" / f"{file}.py"), f"{found.case}: there is no {name}; name another"


@pytest.mark.parametrize("found", ALL, ids=lambda found: found.case)
def test_its_rule_stands_where_it_is_taken_out(found):
    assert found.removals
    for file, old, new in (edit for edits in found.removals for edit in edits):
        assert old != new and old in (ROOT / file).read_text(), (
            f"{found.case}: {file} has no more {old!r}; say in tests/traps.py what takes the rule out now, and run it"
        )
