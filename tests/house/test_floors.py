"""The order of the house: imports run down, never in a circle, and private names stay at home."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "frugalvlm"
# From the ground up. A room imports from the rooms of lower floors and from itself only.
FLOORS = (
    (
        "errors",
        "checks",
        "paths",
        "digest",
        "formats",
        "operators",
        "views",
        "drawing",
        "trace",
        "measure",
    ),
    ("methods", "hosts", "papers"),
    ("engine",),
    ("pocket",),
    ("loading",),
    ("benchmarks",),
    ("training",),
    ("runs",),
    ("verdicts",),
    ("carbon",),
    ("report",),
    ("studies", "probes", "bench"),
    ("door",),
    ("reproduce", "scaffold"),
    ("cli",),
)
FRONT = "frugalvlm"  # the package's front knows all floors
FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
GROUND = FLOORS[0]  # the words that all share; among them, in this order
MODULES = {
    ".".join(("frugalvlm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, wherever in it, for types included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name}: relative imports hide which room is meant"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = whole & MODULES.keys()
            found |= inside
            if inside != whole or node.module not in MODULES:
                found.add(node.module)
    return {module for module in found if module.split(".")[0] == "frugalvlm"} - {name}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else FRONT


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} == {*FLOOR_OF, FRONT}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_down(name: str) -> None:
    if room(name) == FRONT:
        return
    here = room(name)
    for other in imports(name):
        there = room(other)
        lower = there != FRONT and FLOOR_OF[there] < FLOOR_OF[here]
        ground = here in GROUND and there in GROUND and GROUND.index(there) < GROUND.index(here)
        assert there == here or lower or ground, f"{name} imports {other}, which is not below it"


def test_no_module_imports_itself_in_a_circle() -> None:
    # A package's __init__ stands for its room's front: who imports a module runs it too.
    known = {name: imports(name) for name in MODULES}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for other in sorted(known[name]):
            walk(other, (*path, name))
        done.add(name)

    for name in MODULES:
        if room(name) != FRONT:
            walk(name, ())


def test_private_names_stay_in_their_file() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("frugalvlm"):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{name} imports {private} of {node.module}"


def test_private_attributes_of_modules_stay_in_their_file() -> None:
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        modules = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            if f"{node.module}.{alias.name}" in MODULES
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                foreign = node.value.id in modules and node.attr.startswith("_")
                assert not foreign, f"{name} uses {node.value.id}.{node.attr}"


def test_methods_and_hosts_do_not_know_each_other() -> None:
    for name in MODULES:
        others = {room(other) for other in imports(name)}
        assert room(name) != "methods" or "hosts" not in others, name
        assert room(name) != "hosts" or "methods" not in others, name


def test_the_engine_knows_kinds_of_methods_only() -> None:
    for name in MODULES:
        if room(name) == "engine":
            known = {other for other in imports(name) if room(other) == "methods"}
            assert known <= {"frugalvlm.methods.base"}, f"{name} imports {known}"


# Names of other libraries that are private there, and used on purpose.
FOREIGN = {
    "_attn_implementation", "_supports_mm_encoder_outputs",  # transformers
    "_expand_inputs_for_generation",  # transformers
    "_orig_mod", "_cdata", "_is_amx_tile_supported", "_is_avx512_bf16_supported",  # torch
}  # fmt: skip


def test_private_attributes_of_objects_stay_in_their_file() -> None:
    found = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        own = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        }
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=attr):
                    own.add(attr)
                case (
                    ast.AnnAssign(target=ast.Name(id=attr))
                    | ast.Assign(targets=[ast.Name(id=attr)])
                ):
                    own.add(attr)
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith(("__", "_scaled_dot_product"))
        }
        if used - own - FOREIGN:
            found[name] = used - own - FOREIGN
    assert not found
