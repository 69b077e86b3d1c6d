"""Laws of the house that the import contracts do not hold."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("pipeline", "jobs") for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "pipeline")]
MOST_MODULES = 12
LISTS = {"pipeline.models.families"}  # of one value a file, found by themselves: as many as there are families
LONGEST_IN_LIST = 60  # lines, so that it stays one
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING = {"torch.load", "torch.save", "np.load", "np.save", "np.savez", "serialization.load", "serialization.save"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
NO_VERBS = {
    *("The", "A", "An", "Of", "What", "How", "Whether", "Where", "When", "Which", "Who", "Whose", "Whoever", "Why"),
    *("As", "By", "In", "With", "Without", "For", "From", "To", "Off", "Up", "About", "While", "Now", "Also"),
    *("One", "Two", "Sixteen", "Each", "Every", "Everything", "All", "Both", "Another", "Other", "Those", "These"),
    *("That", "This", "Same", "Our", "Ours", "Its", "If", "No", "Not", "Never", "Nothing", "True", "False", "None"),
    *("Raises", "Returns", "Yields", "Gives", "Tells", "Writes", "Reads", "Makes", "Takes", "Holds", "Runs", "Sets"),
    *("Adds", "Checks", "Sends", "Stores", "Keeps", "Turns", "Counts", "Draws", "Prints", "Loads", "Collects"),
    *("Aliases", "Assignments", "Beam", "Bits", "Buffers", "Bytes", "Candidates", "Causal", "Cells", "Codes"),
    *("Columns", "Content", "Cosines", "Curves", "Distinct", "Documents", "Dynamic", "Fields", "Files", "Finished"),
    *("Gamma", "Global", "Gradients", "Hidden", "Honest", "Ids", "Indices", "Keys", "Latent", "Leaves", "Length"),
    *("Lines", "Logit", "Logits", "Losses", "Mean", "Median", "Metric", "Metrics", "Milliseconds", "Models", "Modules"),
    *("Nats", "Optimizer", "Options", "Pairs", "Points", "Positions", "Probes", "Prompt", "Quantized", "Queries"),
    *("Rank", "Rate", "Readable", "Registered", "Room", "Rows", "Scores", "Seconds", "Settings", "Size", "Space"),
    *("Special", "Stored", "Student", "Tables", "Text", "Token", "Tokens", "Training", "Trials", "Valid", "Values"),
    *("Verdicts", "Versions", "Weights", "Widths"),
}
RETIRED_WORDS = {"observer", "mailbox", "feed", "located", "term", "terms", "suggestion"}  # anywhere in a name
RETIRED_NAMES = {"Place", "Loop", "Site", "StepQuantizer", "loop", "site", "sites"}
VAGUE_NAMES = {"found", "one", "some", "how"}  # which say nothing of what they hold


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def lines_where(files, kinds, wrong):
    """Return `file:line` of every node of these kinds for which `wrong` holds."""
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
    assert lines_where(LIBRARY, ast.Call, lambda node: ast.unparse(node.func) in ("print", "sys.stdout.write")) == []


def test_the_library_reads_no_environment_variables():
    names = {"environ", "environb", "getenv", "getenvb"}
    assert lines_where(LIBRARY, ast.Attribute, lambda node: node.attr in names) == []
    imported = lines_where(
        LIBRARY, ast.ImportFrom, lambda node: node.module == "os" and names & {a.name for a in node.names}
    )
    assert imported == []


def test_nothing_is_pickled_to_disk():
    """Nor read from there. The engine hands Ray work that is sealed in memory."""
    engine = ROOT / "pipeline" / "execution" / "engine.py"

    def pickles(name):
        """`name` is dotted; a method counts by what it is called."""
        parts = name.split(".")
        return bool(PICKLES & set(parts)) or ".".join(parts[-2:]) in PICKLING or "pickle" in parts[-1]

    def imports(node):
        stem = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        return any(pickles(f"{stem}{alias.name}") for alias in node.names)

    def allows(node):
        return node.arg == "allow_pickle" and not (isinstance(node.value, ast.Constant) and node.value.value is False)

    def uses(node):
        return pickles(ast.unparse(node)) and ast.unparse(node) not in ("cloudpickle.loads", "cloudpickle.dumps")

    assert lines_where([path for path in FILES if path != engine], ast.Import | ast.ImportFrom, imports) == []
    assert len(lines_where([engine], ast.Import | ast.ImportFrom, imports)) == 1
    assert "from ray import cloudpickle\n" in engine.read_text(encoding="utf-8")
    assert lines_where(FILES, ast.Attribute, uses) == []
    assert lines_where(FILES, ast.keyword, allows) == []


def test_no_code_from_elsewhere_is_trusted():
    def trusts(node):
        return node.arg == "trust_remote_code" and not (
            isinstance(node.value, ast.Constant) and node.value.value is False
        )

    assert lines_where(FILES, ast.keyword, trusts) == []


def test_no_package_holds_more_modules_than_one_looks_through():
    folders = [path.parent for path in FILES if path.name == "__init__.py"]
    counts = {module_name(folder / "__init__.py"): len([*folder.glob("*.py")]) - 1 for folder in folders}
    assert {name for name, modules in counts.items() if modules > MOST_MODULES} <= LISTS


def test_a_module_of_a_list_holds_one_value():
    for path in (path for path in FILES if module_name(path.parent / "__init__.py") in LISTS):
        public = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if not isinstance(node, ast.Expr)]
        named = [ast.unparse(node.targets[0]) for node in public if isinstance(node, ast.Assign)]
        assert path.name == "__init__.py" or named == ["FAMILY"]
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_IN_LIST


def is_command(function):
    """Tell whether the command line prints the docstring as a help text."""
    decorators = map(ast.unparse, function.decorator_list)
    return any(name.endswith(".callback()") or name.startswith("command(") for name in decorators)


def test_a_docstring_begins_with_what_the_function_does():
    def begins_otherwise(function):
        first = (ast.get_docstring(function) or "Do").split()[0].rstrip(",;:.")
        return (first in NO_VERBS or not re.fullmatch("[A-Z][a-z]+", first)) and not is_command(function)

    assert lines_where(FILES, FUNCTIONS, begins_otherwise) == []


def name_in(node):
    """Return the name that a function, class, argument, variable or attribute is given there, or None."""
    if isinstance(node, FUNCTIONS | ast.ClassDef):
        return node.name
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    return None


def words_of(name):
    return {word.lower() for word in re.findall("[A-Z]?[a-z0-9]+|[A-Z]+", name)}


def test_retired_names_do_not_come_back():
    def retired(node):
        name = name_in(node)
        return name is not None and (name in RETIRED_NAMES or bool(RETIRED_WORDS & words_of(name)))

    def fed(node):
        return isinstance(node, ast.FunctionDef) and node.name == "feed"

    runtime = [ROOT / "pipeline" / "runtime" / "runtime.py"]  # whose cache is fed
    named = lines_where([path for path in FILES if path not in runtime], ast.AST, retired)
    named += lines_where(runtime, ast.AST, lambda node: retired(node) and not fed(node))
    assert named == []


def test_names_say_what_they_hold():
    def vague(node):
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        return (stored or isinstance(node, ast.arg)) and name_in(node) in VAGUE_NAMES

    assert lines_where(FILES, ast.Name | ast.arg, vague) == []
