"""The house rules: what lies where, who may import whom, which file says what.

Every rule is a function from a folder or a parsed file to a list of complaints, so that
each is tested twice: on the repository, and on a planted violation.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import curvlinops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "curvlinops"

# ------------------------------------------------------------------ top level

REQUIRED = {"LICENSE", "README.rst", "pyproject.toml", "setup.cfg", "src", "tests"}
ALLOWED = REQUIRED | {".ci", ".gitignore", "benchmarks"}


def top_level_complaints(tracked: list[str]) -> list[str]:
    """Compare the first components of the tracked paths with what belongs there."""
    found = {path.split("/")[0] for path in tracked}
    return [
        *(f"{name}: does not belong at the top level" for name in found - ALLOWED),
        *(f"{name}: missing" for name in REQUIRED - found),
    ]


def test_top_level():
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True
    )
    if listing.returncode or not listing.stdout:
        pytest.skip("not a git checkout, or nothing is tracked yet")
    assert top_level_complaints(listing.stdout.splitlines()) == []


def test_top_level_rule_bites():
    tracked = [f"{name}/x" for name in ALLOWED]
    assert top_level_complaints(tracked) == []
    assert top_level_complaints([*tracked, "docs/index.rst"]) == [
        "docs: does not belong at the top level"
    ]
    assert top_level_complaints([t for t in tracked if "LICENSE" not in t]) == [
        "LICENSE: missing"
    ]


# ------------------------------------------------------------------ configuration

PYPROJECT_SAYS = {"build-system", "project", "ruff", "pytest"}
SETUP_CFG_SAYS = {"files", "mypy", "coverage"}

#: Keys of setup.cfg's [options] that say where files are; the rest is [project]'s.
FILE_OPTIONS = {
    "exclude_package_data",
    "include_package_data",
    "package_data",
    "package_dir",
    "packages",
    "packages.find",
    "py_modules",
}


def pyproject_topics(text: str) -> set[str]:
    """Name what a pyproject.toml configures."""
    tables = tomllib.loads(text)
    topics = set(tables) | set(tables.pop("tool", {}))
    names = {"setuptools": "files", "setuptools_scm": "project"}
    return {names.get(topic, topic) for topic in topics - {"tool"}}


def setup_cfg_topics(text: str) -> set[str]:
    """Name what a setup.cfg configures."""
    parser = ConfigParser()
    parser.read_string(text)
    topics = set()
    for section in parser.sections():
        head, _, rest = section.partition(".")
        if head == "options":
            keys = {rest} if rest else set(parser[section])
            topics |= {"files" if key in FILE_OPTIONS else "project" for key in keys}
        elif section == "metadata":
            topics.add("project")
        else:
            topics.add(re.split("[:-]", section.removeprefix("tool:"))[0])
    return topics


def configuration_complaints(pyproject: str, setup_cfg: str) -> list[str]:
    """Look for topics that both files configure, or that stand in the wrong one."""
    first, second = pyproject_topics(pyproject), setup_cfg_topics(setup_cfg)
    return [
        *(f"{topic}: in both files" for topic in sorted(first & second)),
        *(f"{t}: not in pyproject.toml" for t in sorted(first - PYPROJECT_SAYS)),
        *(f"{t}: not in setup.cfg" for t in sorted(second - SETUP_CFG_SAYS)),
    ]


def test_each_tool_is_configured_in_one_file():
    pyproject = (ROOT / "pyproject.toml").read_text()
    setup_cfg = (ROOT / "setup.cfg").read_text()
    assert configuration_complaints(pyproject, setup_cfg) == []
    assert pyproject_topics(pyproject) == PYPROJECT_SAYS
    assert setup_cfg_topics(setup_cfg) == SETUP_CFG_SAYS


@pytest.mark.parametrize(
    ("pyproject", "setup_cfg", "topic"),
    [
        ("[tool.mypy]", "[mypy-scipy.*]", "mypy"),
        ("[tool.coverage.run]", "[coverage:report]", "coverage"),
        ("[tool.pytest.ini_options]", "[tool:pytest]", "pytest"),
        ("[tool.setuptools.package-data]", "[options]\npackages = find:", "files"),
        ("[tool.setuptools]", "[options.packages.find]", "files"),
        ("[project]", "[metadata]", "project"),
        ("[project]", "[options]\ninstall_requires = scipy", "project"),
        ("[project]", "[options.entry_points]", "project"),
    ],
)
def test_configuration_rule_bites(pyproject, setup_cfg, topic):
    complaints = configuration_complaints(pyproject, setup_cfg)
    assert f"{topic}: in both files" in complaints
    assert len(complaints) == 2


# ------------------------------------------------------------------ imports

#: Who may import whom: a module imports from its own level and from those above it in
#: this list, never from those below. ``*`` stands for any rest of a dotted name.
LEVELS = [
    [
        *["_adjoint", "_agreement", "_backward", "_caching", "_closed_forms"],
        *["_compiled", "_conflicts", "_copies", "_counts", "_cuda_graph", "_data"],
        *["_differences", "_draws", "_failures", "_files", "_finite", "_hooks"],
        *["_interrupts", "_isolation", "_journal", "_locks", "_lockstep"],
        *["_loss_state", "_memory", "_objects", "_once", "_operand", "_passes"],
        *["_policy", "_random", "_reading", "_shuffling", "_spaces", "_substitutes"],
        *["_hashed", "_walk"],
    ],
    [
        *["_adapter", "_checksum", "_composites", "_foreign", "_forms", "_hidden"],
        *["_identity"],
        *["_model", "_operator"],
        *["_program", "_reduction", "_replay", "_watch"],
        *["estimators", "estimators.*", "losses", "losses.*"],
    ],
    [
        *["_apart", "_by_forms", "_columns", "_dense", "_determinism", "_folding"],
        *["_grouping", "_joining", "_plain"],
        *["_ledger", "_linearization", "_loss_leaves", "_order", "_parts", "_plan"],
        *[
            "_reach",
            "_rows",
            "_status",
            "_structure",
            "_terms",
            "_tracker",
            "_verify",
            "diag",
        ],
        *["structured"],
    ],
    ["_krylov", "kronecker", "nystrom", "risk", "risk_operator"],
    [
        *["ggn", "ggn_diagonal", "gradient_covariance", "gram", "hessian", "inverse"],
        *["jacobian", "scalar_function"],
    ],
    ["kfac", "kfac.*"],
    [
        *["examples", "plots", "plots.*", "utils"],
        # Modules that only hand on names, at the paths where scripts look for them:
        *["blockdiagonal", "eigh", "ekfac", "kfac_utils", "sampling"],
        *["papyan2020traces", "papyan2020traces.*", "submatrix"],
    ],
    ["__init__"],
    # What people run. Nothing imports it, so it may show the public names in use:
    ["__main__", "examples.*", "report", "report.*"],
]

#: The only modules that may import an extra's packages when they are imported.
SCRIPTS = ["__main__", "examples.*"]

#: Distributions whose import name is another.
IMPORT_NAMES = {"scikit-learn": "sklearn"}


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def level(name: str) -> int | None:
    """Return the place of a module in the table; ``None`` if it has none."""
    return next((i for i, names in enumerate(LEVELS) if matches(name, names)), None)


def modules(package: Path) -> dict[str, Path]:
    """Map names relative to the package (itself ``__init__``) to files."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def import_statements(
    tree: ast.AST, in_functions: bool = True
) -> Iterator[ast.Import | ast.ImportFrom]:
    """Walk the import statements that can run, those of type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            yield from import_statements(ast.Module(node.orelse, []), in_functions)
        elif in_functions or not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            yield from import_statements(node, in_functions)


def imported(
    name: str, path: Path, in_functions: bool = True, tree: ast.AST | None = None
) -> Iterator[str]:
    """Name what a file imports: absolute dotted names, ``a.b`` for ``from a import b``.

    ``name`` is the importing module's, relative to the package; ``tree`` a part of it.
    """
    parts = ["curvlinops", *name.split(".")]
    if path.stem == "__init__" and name != "__init__":
        parts.append("__init__")
    tree = ast.parse(path.read_text()) if tree is None else tree
    for node in import_statements(tree, in_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            base = parts[: -node.level] if node.level else []
            base = [*base, *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def internal(target: str, known: dict[str, Path]) -> str | None:
    """Return the module of the package that an absolute dotted name leads to."""
    head, *rest = target.split(".")
    if head != "curvlinops":
        return None
    while rest and ".".join(rest) not in known:
        # The last part is a name inside a module, or a module that isn't there:
        rest.pop()
    return ".".join(rest) or "__init__"


def layering_complaints(package: Path) -> list[str]:
    """Look for unknown modules, upward imports, cycles and curious estimators."""
    known = modules(package)
    graph = {
        name: {m for t in imported(name, path) if (m := internal(t, known))} - {name}
        for name, path in known.items()
    }
    complaints = [
        f"{name}: place it in LEVELS of tests/test_repository.py"
        for name in graph
        if level(name) is None
    ]
    if complaints:
        return complaints

    rank = {name: level(name) for name in graph}
    for name, targets in graph.items():
        allowed = rank[name]
        for target in sorted(targets):
            if rank[target] > allowed:
                complaints.append(
                    f"{name} (level {allowed}) imports {target} (level {rank[target]})"
                )
            elif matches(name, ["estimators", "estimators.*"]) and not (
                rank[target] == 0 or matches(target, ["estimators", "estimators.*"])
            ):
                complaints.append(f"{name} imports {target}: estimators see only `@`")
    level_mates = {
        name: {target for target in targets if rank[target] == rank[name]}
        for name, targets in graph.items()
    }
    try:
        TopologicalSorter(level_mates).prepare()
    except CycleError as error:
        complaints.append("cycle: " + " <- ".join(error.args[1]))
    return complaints


def import_names(requirements: list[str]) -> set[str]:
    """Return the import names of requirement strings."""
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]
    return {IMPORT_NAMES.get(name, name) for name in names}


def dependency_complaints(package: Path, pyproject: str) -> list[str]:
    """Look for third-party imports that a plain install does not provide."""
    project = tomllib.loads(pyproject)["project"]
    always = import_names(project["dependencies"])
    always |= {"curvlinops", *sys.stdlib_module_names}
    extra = import_names(project["optional-dependencies"]["report"])
    complaints = []
    for name, path in modules(package).items():
        everywhere = {t.split(".")[0] for t in imported(name, path)}
        on_import = {t.split(".")[0] for t in imported(name, path, in_functions=False)}
        complaints += [
            f"{name} imports {target}: no dependency"
            for target in sorted(everywhere - always - extra)
        ]
        if not matches(name, SCRIPTS):
            complaints += [
                f"{name} imports {target} when it is imported: move it to the function"
                for target in sorted(on_import & extra)
            ]
    return complaints


def plant(package: Path, files: dict[str, str]) -> Path:
    """Write a package with the given sources."""
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


def test_layering():
    assert {"__init__", "_spaces", "_operator"} <= modules(PACKAGE).keys()
    assert layering_complaints(PACKAGE) == []


GOOD = {
    "__init__.py": "from curvlinops import _conflicts\nfrom .risk import Risk",
    "_conflicts.py": "",
    "_spaces.py": "import numpy, torch",
    "_operator.py": "from ._spaces import TensorSpace",
    "risk.py": "import curvlinops._operator as o\nfrom curvlinops._spaces import T",
    "estimators/__init__.py": "from curvlinops.estimators.trace import hutch",
    "estimators/trace.py": "from .._spaces import T\nfrom . import norm",
    "estimators/norm.py": "",
    "examples/__init__.py": "from curvlinops.risk import Risk",
    "examples/fit.py": "from curvlinops import Risk",
}


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("risk.py", "import curvlinops.hessian", "risk (level 3) imports hessian"),
        ("risk.py", "from curvlinops import hessian", "risk (level 3) imports hessian"),
        ("risk.py", "from curvlinops.hessian import H", "imports hessian (level 4)"),
        ("risk.py", "from .hessian import H", "risk (level 3) imports hessian"),
        ("risk.py", "from . import hessian as h", "risk (level 3) imports hessian"),
        ("risk.py", "from curvlinops import Risk", "imports __init__ (level 7)"),
        ("risk.py", "import curvlinops", "imports __init__ (level 7)"),
        ("risk.py", "def f():\n from .hessian import H", "imports hessian"),
        ("risk.py", "class C:\n if x:\n  from . import hessian", "imports hessian"),
        ("kfac/a.py", "from ..examples import I", "kfac.a (level 5) imports examples"),
        ("kfac/__init__.py", "from ..utils import f", "kfac (level 5) imports utils"),
        ("utils.py", "from .examples.fit import f", "imports examples.fit (level 8)"),
        ("_spaces.py", "from . import _random", "cycle: _"),
        ("estimators/norm.py", "from .trace import f", "cycle: estimators."),
        ("estimators/a.py", "from .._operator import f", "estimators see only `@`"),
        ("estimators/a.py", "from ..losses import f", "estimators see only `@`"),
        ("gadget.py", "", "gadget: place it in LEVELS of tests/test_repository.py"),
        ("kfac_more/a.py", "", "kfac_more.a: place it in LEVELS"),
    ],
)
def test_layering_rule_bites(tmp_path, file, source, complaint):
    plant(tmp_path, GOOD)
    plant(tmp_path, dict.fromkeys(["hessian.py", "losses.py", "utils.py"], ""))
    plant(tmp_path, {"_random.py": "from . import _spaces"})
    assert layering_complaints(tmp_path) == []

    plant(tmp_path, {file: source})
    found = layering_complaints(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize("guard", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_imports_for_type_checkers_do_not_count(tmp_path, guard):
    source = f"if {guard}:\n from .ggn import G\nelse:\n from ._spaces import T"
    plant(tmp_path, GOOD | {"ggn.py": "", "risk.py": source})
    assert layering_complaints(tmp_path) == []

    plant(tmp_path, {"risk.py": source.replace("_spaces", "ggn")})
    assert layering_complaints(tmp_path) == ["risk (level 3) imports ggn (level 4)"]


def test_dependencies():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert dependency_complaints(PACKAGE, pyproject) == []


@pytest.mark.parametrize(
    ("file", "source", "complaints"),
    [
        ("risk.py", "import matplotlib.pyplot as plt", 1),
        ("risk.py", "try:\n from sklearn import svm\nexcept ImportError: ...", 1),
        ("risk.py", "def f():\n import sklearn", 0),
        ("risk.py", "import cupy", 1),
        ("risk.py", "def f():\n import triton", 1),
        ("risk.py", "import torch.func, scipy.sparse, json, tqdm.auto", 0),
        ("risk.py", "from typing import *\nif TYPE_CHECKING:\n import cupy", 0),
        ("plots.py", "import matplotlib.pyplot as plt", 1),
        ("plots.py", "import seaborn", 1),
        ("examples/fit.py", "import sklearn", 0),
        ("examples/__init__.py", "import sklearn", 1),
    ],
)
def test_dependency_rule_bites(tmp_path, file, source, complaints):
    pyproject = (ROOT / "pyproject.toml").read_text()
    plant(tmp_path, GOOD)
    assert dependency_complaints(tmp_path, pyproject) == []

    plant(tmp_path, {file: source})
    assert len(dependency_complaints(tmp_path, pyproject)) == complaints


# ------------------------------------------------------------------ errors

#: What is also raised when memory runs out, which is no reason to give something up.
BROAD = {"RuntimeError", "Exception", "BaseException"}

#: Functions that hand every error on to another thread, or tidy up after one.
EXEMPT = {
    "_lockstep._work",
    "_cuda_graph._clean_up",
    "_interrupts.leave_forward_mode",
}


def names_in(node: ast.expr | None) -> set[str]:
    """Return the names of the exceptions in an ``except`` clause."""
    if node is None:
        return {"BaseException"}
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return {ast.unparse(part).rpartition(".")[2] for part in parts}


def lets_memory_errors_pass(handler: ast.ExceptHandler) -> bool:
    """Whether a handler first asks the one helper, or raises what it has caught."""
    first, last = handler.body[0], handler.body[-1]
    if ast.unparse(first) == f"raise_if_out_of_memory({handler.name})":
        return True
    return isinstance(last, ast.Raise) and last.exc is None


def handler_complaints(package: Path) -> list[str]:
    """Look for places that take a lack of memory for something else."""
    complaints = []
    for name, path in modules(package).items():
        tree = ast.parse(path.read_text())
        exempt = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and f"{name}.{node.name}" in EXEMPT
            for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in exempt:
                continue
            if isinstance(node, ast.ExceptHandler):
                broad = names_in(node.type) & BROAD
                wrong = broad and not lets_memory_errors_pass(node)
            elif isinstance(node, ast.Call):
                suppresses = names_in(node.func) == {"suppress"}
                wrong = suppresses and any(names_in(arg) & BROAD for arg in node.args)
            else:
                continue
            if wrong:
                where = f"{name}, line {node.lineno}"
                complaints.append(f"{where}: call `raise_if_out_of_memory` first")
    return complaints


def test_lack_of_memory_is_raised():
    assert handler_complaints(PACKAGE) == []


@pytest.mark.parametrize(
    ("handler", "complaints"),
    [
        ("except RuntimeError: y = None", 1),
        ("except Exception as e: y = str(e)", 1),
        ("except: y = None", 1),
        ("except (TypeError, RuntimeError) as e: raise ValueError('no') from e", 1),
        ("except builtins.Exception: y = None", 1),
        ("except RuntimeError as e:\n    y = 1\n    raise_if_out_of_memory(e)", 1),
        ("except RuntimeError as e:\n    raise_if_out_of_memory(None)", 1),
        ("except RuntimeError as e:\n    raise_if_out_of_memory(e)\n    y = 1", 0),
        ("except BaseException:\n    y = 1\n    raise", 0),
        ("except ValueError: y = None", 0),
        ("except ValueError:\n    with suppress(RuntimeError): y = f()", 1),
        ("except ValueError:\n    with contextlib.suppress(OSError): y = f()", 0),
    ],
)
def test_memory_rule_bites(tmp_path, handler, complaints):
    plant(tmp_path, GOOD)
    assert handler_complaints(tmp_path) == []

    plant(tmp_path, {"risk.py": f"try:\n    y = f()\n{handler}"})
    assert len(handler_complaints(tmp_path)) == complaints


def test_import_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('jinja2', 'matplotlib', 'sklearn', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import curvlinops, curvlinops.plots\n"
        "print(curvlinops.__version__)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# ------------------------------------------------------------------ the package


def test_types_are_advertised():
    assert (PACKAGE / "py.typed").is_file()


def undocumented(module: ModuleType) -> list[str]:
    """List a module's public methods that neither have nor inherit a docstring."""
    return [
        f"{module.__name__}.{owner.__name__}.{name}"
        for owner in vars(module).values()
        if inspect.isclass(owner) and owner.__module__ == module.__name__
        for name, value in vars(owner).items()
        if not name.startswith("_") and hasattr(value, "__get__")
        if not any(getattr(vars(c).get(name), "__doc__", "") for c in owner.__mro__)
    ]


@pytest.mark.parametrize("name", modules(PACKAGE))
def test_public_methods_are_documented(name):
    if name != "__main__":
        full = "curvlinops" if name == "__init__" else f"curvlinops.{name}"
        assert undocumented(importlib.import_module(full)) == []


def test_documentation_rule_bites():
    module = ModuleType("planted")
    source = """
class A:
    def f(self):
        "Said once."
    def _g(self): ...
class B(A):
    def f(self): ...
    def h(self): ...
    @property
    def p(self): ...
    q = 1
"""
    exec(source, vars(module))
    assert undocumented(module) == ["planted.B.h", "planted.B.p"]


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert curvlinops.__version__ == project["version"]
