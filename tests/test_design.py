"""The equivalent rules, enforced: one door per room, a story per module, types, sizes, and the contract of a method."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moespresso
import moespresso.methods
from moespresso.core.method import Prunes, Quantizes, Refits, Selects
from moespresso.core.registry import methods
from moespresso.formats import codecs as all_codecs

SOURCE = Path(moespresso.__file__).parent
MODULES = sorted(path for path in SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
# `core` is no room with a door but the words everyone speaks: its modules are imported one by one.
ROOMS = sorted(path.parent for path in MODULES if path.name == "__init__.py" and path.parent.name != "core")

Function = ast.FunctionDef | ast.AsyncFunctionDef
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
every_room = pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
every_method = pytest.mark.parametrize("kind", list(methods()))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def test_the_source_is_where_this_test_looks():
    assert len(MODULES) > 40
    assert {"checkpoint", "data", "quality", "statistics", "methods", "model", "stream"} <= {
        r.name for r in ROOMS
    }


# One door per room


def own_names(room: Path) -> set[str]:
    """Public names that a room's door defines, or takes from the room's own modules."""
    names: set[str] = set()
    inside = module_name(room / "__init__.py")
    for node in TREES[room / "__init__.py"].body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(inside):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ClassDef | Function):
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


@every_room
def test_the_door_names_exactly_what_is_public(room: Path):
    module = importlib.import_module(module_name(room / "__init__.py"))
    listed = list(module.__all__)
    assert len(listed) == len(set(listed))
    missing = [name for name in listed if not hasattr(module, name)]
    assert not missing, f"in __all__, but not importable: {missing}"
    if room != SOURCE:  # the front door opens its verbs only when they are used
        assert set(listed) == own_names(room)


VERBS = {
    "build",
    "demo",
    "evaluate",
    "export",
    "inspect",
    "load",
    "measure",
    "methods",
    "plan",
    "press",
    "verify",
}


def test_the_front_door_offers_the_verbs_and_nothing_else():
    assert set(moespresso.__all__) == {"__version__", *VERBS}
    with pytest.raises(AttributeError, match="has no attribute 'pres'"):
        moespresso.pres  # noqa: B018


def test_a_verb_is_a_verb_though_a_room_has_its_name():
    assert [verb for verb in sorted(VERBS) if not inspect.isfunction(getattr(moespresso, verb))] == []


def test_a_verb_is_still_a_verb_after_its_room_was_imported():
    for room in ROOMS:
        importlib.import_module(module_name(room / "__init__.py"))
    assert [verb for verb in VERBS if not hasattr(getattr(moespresso, verb), "__code__")] == []


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_private_names_stay_in_their_module():
    peeking: list[str] = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moespresso."):
                peeking += [
                    f"{path.name}: {alias.name}" for alias in node.names if alias.name.startswith("_")
                ]
    assert not peeking


# Stories, types and sizes


@every_module
def test_a_module_opens_with_its_story(path: Path):
    story = ast.get_docstring(TREES[path])
    assert story
    assert story[0].isupper() or story.startswith("`")


@every_module
def test_every_function_says_what_it_returns(path: Path):
    silent = [f"{node.name}, line {node.lineno}" for node in functions(TREES[path]) if node.returns is None]
    assert not silent


@every_module
def test_public_functions_and_classes_have_docstrings(path: Path):
    silent: list[str] = []
    for node in TREES[path].body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            silent += [f"{node.name}.{inner.name}".removesuffix(f".{node.name}")
                       for inner in (node, *_methods(node))
                       if not inner.name.startswith("_") and ast.get_docstring(inner) is None]  # fmt: skip
    assert not silent


def _methods(node: ast.ClassDef | Function) -> list[Function]:
    """A class's functions; those of a protocol are explained in the class's docstring."""
    if not isinstance(node, ast.ClassDef) or any(ast.unparse(base) == "Protocol" for base in node.bases):
        return []
    return [inner for inner in node.body if isinstance(inner, Function)]


@every_module
def test_files_stay_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 500


def test_functions_stay_short():
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1 for tree in TREES.values() for node in functions(tree)
    )
    assert statistics.median(lengths) < 12
    assert lengths[int(0.95 * len(lengths))] < 50


def test_the_readme_stays_short():
    assert len((SOURCE.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_only_the_command_line_prints():
    printing = [
        path.name
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert set(printing) <= {"app.py"}


# What every method promises


@every_method
def test_a_methods_settings_are_a_frozen_dataclass_of_typed_defaults(kind: str):
    cls = methods()[kind]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.kind == kind
    assert re.fullmatch("[a-z][a-z_]+", kind)
    assert "kind" not in {field.name for field in dataclasses.fields(cls)}
    step: Any = cls()
    assert isinstance(hash(step), int)
    roles = [role for role in (Selects, Quantizes, Prunes, Refits) if isinstance(step, role)]
    assert len(roles) == 1, roles
    assert (isinstance(step.rescore, bool), isinstance(step.uneven, bool)) == (True, True)
    assert step.describe() == {"kind": kind} | dataclasses.asdict(step)


def test_nobody_probes_a_step_for_members():
    """What a step may be asked for stands in the contract."""
    probing = [
        f"{module_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and isinstance(node.args[0], ast.Name | ast.Attribute)
        and ast.unparse(node.args[0]).rpartition(".")[2] == "step"
        and isinstance(node.args[1], ast.Constant)
    ]
    assert probing == []


@every_method
def test_a_methods_settings_are_all_explained(kind: str):
    (told,) = verb("methods")(kind)
    assert (told["kind"], told["doc"]) == (kind, inspect.getdoc(inspect.getmodule(methods()[kind])))
    assert told["summary"]
    assert [row["name"] for row in told["settings"]] == [f.name for f in dataclasses.fields(methods()[kind])]
    assert all(len(row["doc"]) > 8 for row in told["settings"]), told["settings"]


def verb(name: str) -> Any:
    return getattr(importlib.import_module("moespresso.api"), name)


@every_method
def test_a_method_is_one_file_with_its_formula_or_paper(kind: str):
    story = inspect.getdoc(inspect.getmodule(methods()[kind])) or ""
    assert re.search(r"\b\d{4}\.\d{4,5}\b|doi\.org|=", story), "neither a formula nor a paper"
    assert "\n" not in story.split("\n\n")[0].strip() or len(story.split("\n\n")[0]) < 300
    registered = [cls for cls in methods().values() if cls.__module__ == methods()[kind].__module__]
    assert len(registered) == 1


def test_every_methods_file_is_registered():
    # What several methods share begins with an underscore.
    files = {path.stem for path in (SOURCE / "methods").glob("[!_]*.py")}
    assert files == {cls.__module__.rpartition(".")[2] for cls in methods().values()}


# Names with an index


# Addresses as people type them (owner/name@revision) are no names of values.
INDEX_KNOWN_IN = {"core/stats.py", "checkpoint/hub.py"}


@every_module
def test_only_one_module_knows_how_an_index_is_written(path: Path):
    tree = TREES[path]
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    marks = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and "@" in node.value
        and id(node) not in docstrings
    ]
    assert not marks or str(path.relative_to(SOURCE)) in INDEX_KNOWN_IN, f"lines {marks}"


def test_only_one_module_writes_on_experts():
    """Who wants to see what passes inside them says so to `model.observing`."""
    writing = [
        module_name(path) for path in MODULES if "experts.__dict__" in path.read_text(encoding="utf-8")
    ]
    assert writing == ["moespresso.model.experts"]


# The front door is light


def test_importing_moespresso_does_not_import_torch():
    heavy = ("torch", "transformers", "numpy", "safetensors", "pydantic", "typer", "rich", "yaml")
    assert (
        run_python(f"import sys, moespresso\nprint([name for name in {heavy} if name in sys.modules])")
        == "[]"
    )


# Rooms


def rooms_of(name: str) -> tuple[str, ...]:
    """The parts of a module's name behind the package's own."""
    return tuple(name.split(".")[1:])


def imports(tree: ast.AST) -> Iterator[ast.ImportFrom | ast.Import]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import))


def test_nobody_goes_past_a_rooms_door():
    """What a room offers to others stands in its door; `core` has none, and what begins with `_` lies outside of all rooms."""
    rooms = {room.name for room in ROOMS if room != SOURCE}
    past: list[str] = []
    for path, tree in TREES.items():
        own = rooms_of(module_name(path))[:1]
        for node in imports(tree):
            parts = rooms_of(node.module or "") if isinstance(node, ast.ImportFrom) else ()
            if len(parts) > 1 and parts[0] in rooms and parts[:1] != own:
                past.append(f"{module_name(path)}:{node.lineno} {node.module}")
    assert past == []


def test_what_prose_points_at_is_there():
    """`room.module.name` in a docstring, a comment or the docs names something that exists."""
    rooms = "|".join(sorted({room.name for room in ROOMS if room != SOURCE} | {"core"}))
    pointer = re.compile(rf"`((?:{rooms})(?:\.[A-Za-z_]\w*)+)`")
    docs = SOURCE.parents[1] / "docs"
    lost: list[str] = []
    for path in [*MODULES, *sorted(docs.glob("*.md"))]:
        for name in pointer.findall(path.read_text(encoding="utf-8")):
            if ".safetensors" not in name and not is_there(name):
                lost.append(f"{path.name}: {name}")
    assert lost == []


def is_there(name: str) -> bool:
    try:
        pkgutil.resolve_name(f"moespresso.{name}")
    except (ImportError, AttributeError):
        return False
    return True


# What is imported only when it is needed: an extra that may be missing, what would make every start slow, and the command
# line and the hook, which must not pull in torch.
LATE = {
    "moespresso._hook": "moespresso.runtime",
    "moespresso.data.files": "pyarrow",
    "moespresso.data.hub": "datasets",
    "moespresso.runtime.saving": "compressed_tensors",
    "moespresso.verify.checks": "moespresso.verify.library",
}


def test_imports_stand_at_the_top():
    late: list[str] = []
    for path, tree in TREES.items():
        name = module_name(path)
        inside = (node for function in functions(tree) for node in imports(function))
        for node in inside:
            module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
            allowed = name.startswith("moespresso.cli") or module.startswith(LATE.get(name, " "))
            if not allowed:
                late.append(f"{name}:{node.lineno} {module}")
    assert late == []


def test_nobody_but_codecs_asks_how_a_matrix_is_stored():
    """Kinds of formats and layouts are compared in `formats` alone: a new one must be one file."""
    codecs = {word for held in all_codecs() for word in (held.layout, *held.kinds)} - {"rows", "columns"}
    asking: list[str] = []
    for path, tree in TREES.items():
        if path.parent.name == "formats":
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Compare):
                continue
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            words = {part.value for side in (node.left, *node.comparators) for part in ast.walk(side)
                     if isinstance(part, ast.Constant) and isinstance(part.value, str)}  # fmt: skip
            kinds = any(re.search(r"(\bformat|packed)\w*\.(kind|layout)\b", side) for side in sides)
            if (kinds and "kinds" not in sides) or (
                words & codecs and any("layout" in side or "kind" in side for side in sides)
            ):
                asking.append(f"{module_name(path)}:{node.lineno} {ast.unparse(node)}")
    assert asking == []


def test_functions_take_few_arguments():
    many: list[str] = []
    for path, tree in TREES.items():
        if path.parent.name == "cli":  # an option is an argument there
            continue
        for node in functions(tree):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
            if len(names) > 6:
                many.append(f"{module_name(path)}.{node.name}: {len(names)}")
    assert many == []


def test_the_ground_floor_stays_small():
    core = (path for path in MODULES if path.parent.name == "core")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core) < 1500


@every_module
def test_docstrings_stay_within_110_columns(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wide: list[int] = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            story = node.body[0]
            wide += [number for number in range(story.lineno, (story.end_lineno or 0) + 1)
                     if len(lines[number - 1]) > 110]  # fmt: skip
    assert wide == []
