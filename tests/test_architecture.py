"""Laws of the house that the import contracts do not hold."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("pipeline", "jobs") for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "pipeline")]
LONGEST = 350
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def found(files, kinds, wrong):
    """`file:line` of every node of some kinds for which `wrong` holds."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kinds) and wrong(node)
    ]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_can_be_imported_and_says_what_it_is(path):
    assert importlib.import_module(module_name(path)).__doc__


def test_the_library_does_not_print():
    assert found(LIBRARY, ast.Call, lambda node: ast.unparse(node.func) in ("print", "sys.stdout.write")) == []


def test_the_library_reads_no_environment_variables():
    names = {"environ", "environb", "getenv", "getenvb"}
    assert found(LIBRARY, ast.Attribute, lambda node: node.attr in names) == []
    imported = found(LIBRARY, ast.ImportFrom, lambda node: node.module == "os" and names & {a.name for a in node.names})
    assert imported == []


def test_nothing_is_pickled_to_disk():
    def module_of(node):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        return PICKLES & {name.split(".")[0] for name in names}

    assert found(FILES, ast.Import | ast.ImportFrom, module_of) == []
    assert found(FILES, ast.Call, lambda node: ast.unparse(node.func) in ("torch.load", "torch.save", "np.load")) == []


def test_no_code_from_elsewhere_is_trusted():
    def trusts(node):
        return node.arg == "trust_remote_code" and not (
            isinstance(node.value, ast.Constant) and node.value.value is False
        )

    assert found(FILES, ast.keyword, trusts) == []


def test_no_file_is_too_long_to_be_read_at_once():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}
