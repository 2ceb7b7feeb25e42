"""The house: imports point one way, libraries stay in their rooms, nothing that is read can execute code."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

BASE = {f"elmo_stream.{name}" for name in ("config", "errors", "files", "pretrained", "system", "threads")}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "base": {"base"},
    "data": {"base", "data"},
    "model": {"base", "kernels", "model"},
    "training": {"base", "data", "kernels", "model", "training"},
    "top": {"base", "data", "kernels", "model", "training", "top"},
}
ROOMS = {
    "click": ["elmo_stream.cli*"],
    "fsspec": ["elmo_stream.data.remote"],
    "numba": ["elmo_kernels.*"],
    "transformers": ["elmo_stream.data.tokenize*", "elmo_stream.model.encoder*"],
    "triton": ["elmo_kernels.*"],
    "webdataset": [],  # it unpickles what it reads; our tars are read without it
    "zarr": ["elmo_stream.data.store_zarr"],
}
HEAVY = {"numba", "numpy", "sklearn", "tensorboard", "tokenizers", "torch", "transformers", "triton", "zarr"}
EXECUTES = {"cloudpickle", "cPickle", "dill", "joblib", "marshal", "pickle", "shelve"}
DISTRIBUTION = {"optimi": "torch-optimi", "sklearn": "scikit-learn"}  # where it is not the import name


@dataclass(frozen=True)
class Import:
    """``target`` is a module if it is one of ours; ``at_load`` is false in a function or for types only."""

    module: str
    target: str
    line: int
    at_load: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("kernels", "__init__"))


SOURCES = {
    _module_name(path): path
    for folder in ("elmo_stream", "kernels/elmo_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_bytes()) for module, path in SOURCES.items()}


def _imports(module: str, tree: ast.AST, at_load: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; name the whole module."
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(module, whole if whole in SOURCES else str(node.module), node.lineno, at_load)
        else:
            types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(module, node, at_load and not types_only and not is_function)


IMPORTS = [found for module, tree in TREES.items() for found in _imports(module, tree)]


def _layer(module: str) -> str:
    if module.split(".")[0] == "elmo_kernels":
        return "kernels"
    if module in BASE:
        return "base"
    part = module.removeprefix("elmo_stream.").split(".")[0]
    return part if part in ("data", "model", "training") else "top"


def _third_party(target: str) -> str | None:
    top = target.split(".")[0]
    return None if top in sys.stdlib_module_names or top in ("elmo_stream", "elmo_kernels") else top


def _unsafe(tree: ast.AST) -> Iterator[str]:
    yield from (str(found) for found in _imports("", tree) if found.target.split(".")[0] in EXECUTES)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                yield f"line {node.lineno}: {ast.unparse(node)}"
            case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=ast.Constant(value=False)):
                pass
            case ast.keyword(arg="trust_remote_code" | "allow_pickle"):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_imports_point_one_way() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.target in SOURCES and _layer(found.target) not in MAY_IMPORT[_layer(found.module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_load_in_an_order_without_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in IMPORTS:
        if found.at_load and found.target in SOURCES:
            graph[found.module].add(found.target)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_the_base_needs_the_standard_library_only() -> None:
    wrong = [str(found) for found in IMPORTS if found.module in BASE and _third_party(found.target)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_that_may_be_exchanged_stays_in_its_room(library: str) -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.target.split(".")[0] == library and not any(fnmatch(found.module, room) for room in ROOMS[library])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [
        text for extra, texts in project["optional-dependencies"].items() if extra != "test" for text in texts
    ]
    declared = {text.partition(";")[0].partition("[")[0].partition(">")[0].strip() for text in requirements}
    needed = {str(found): name for found in IMPORTS if (name := _third_party(found.target))}
    wrong = [found for found, name in needed.items() if DISTRIBUTION.get(name, name.replace("_", "-")) not in declared]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_that_is_read_from_a_file_can_execute_code(module: str) -> None:
    assert list(_unsafe(TREES[module])) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "weights = torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
    ],
)
def test_the_search_for_unsafe_reading_finds_each_kind(source: str) -> None:
    assert len(list(_unsafe(ast.parse(source)))) == 1


def test_the_folder_kernels_is_no_package() -> None:
    # transformers imports the Hugging Face package `kernels`; a package of ours would stand in front of it.
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_source_file_is_longer_than_a_reader_can_hold() -> None:
    folders = [ROOT / name for name in ("elmo_stream", "kernels", "tools", "tests")]
    lengths = {path: len(path.read_bytes().splitlines()) for folder in folders for path in folder.rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_help_appears_at_once_because_the_command_line_loads_no_heavy_library() -> None:
    code = f"import sys, elmo_stream.cli; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
