"""_C.pyi says what the compiled module has: no more, no less, name by name and type by type."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from deltazip import _C

STUB = Path(__file__).resolve().parents[2] / "python" / "deltazip" / "_C.pyi"
TREE = ast.parse(STUB.read_text())
STUB_CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
FROM_OBJECT = {"__init__", "__doc__", "__module__", "__new__", "__weakref__", "__dict__"}


def is_enum(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) == "enum.Enum" for base in node.bases)


def bare(annotation: str) -> str:
    """An annotation as the stub spells it: no module names."""
    return annotation.replace("deltazip._C.", "").replace("collections.abc.", "")


def stub_members(node: ast.ClassDef) -> dict[str, ast.stmt]:
    members: dict[str, ast.stmt] = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            members[item.name] = item
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            members[item.target.id] = item
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            members[item.targets[0].id] = item
    return members


def public(names: object) -> set[str]:
    return {name for name in names if not name.startswith("_")}  # type: ignore[attr-defined]


def test_the_module_has_the_stubs_names() -> None:
    variables = {
        item.target.id
        for item in TREE.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    assert variables == {"__version__"}
    assert public(vars(_C)) == set(STUB_CLASSES)
    assert re.fullmatch(r"\d+\.\d+\.\d+", _C.__version__)


@pytest.mark.parametrize("name", sorted(STUB_CLASSES))
def test_a_class_has_the_stubs_members(name: str) -> None:
    node, cls = STUB_CLASSES[name], getattr(_C, name)
    assert [ast.unparse(base).removeprefix("enum.") for base in node.bases] == [
        base.__name__
        for base in cls.__bases__
        if base.__name__ not in ("object", "pybind11_object")
    ]
    have = {member.name: member.value for member in cls} if is_enum(node) else vars(cls)
    assert public(have) == public(stub_members(node))
    if is_enum(node):
        for member, value in have.items():
            assert ast.unparse(stub_members(node)[member]) == f"{member} = {value}"


def properties() -> list[tuple[str, str]]:
    return [
        (node.name, name)
        for node in STUB_CLASSES.values()
        for name, item in stub_members(node).items()
        if isinstance(item, ast.AnnAssign)
        or (isinstance(item, ast.FunctionDef) and len(item.decorator_list) > 0)
    ]


@pytest.mark.parametrize(("owner", "name"), properties())
def test_a_property_has_the_stubs_type(owner: str, name: str) -> None:
    item = stub_members(STUB_CLASSES[owner])[name]
    prop = getattr(_C, owner).__dict__[name]
    got = bare(prop.fget.__doc__.strip().rpartition(" -> ")[2])
    if isinstance(item, ast.AnnAssign):
        assert prop.fset is not None, "the stub says it can be set"
        assert got == ast.unparse(item.annotation)
    else:
        assert isinstance(item, ast.FunctionDef)
        assert prop.fset is None, "the stub says it is read-only"
        assert item.returns is not None
        assert got == ast.unparse(item.returns)


def methods() -> list[tuple[str, str]]:
    return [
        (node.name, name)
        for node in STUB_CLASSES.values()
        for name, item in stub_members(node).items()
        if isinstance(item, ast.FunctionDef) and not item.decorator_list and name != "__init__"
    ]


@pytest.mark.parametrize(("owner", "name"), methods())
def test_a_method_has_the_stubs_signature(owner: str, name: str) -> None:
    item = stub_members(STUB_CLASSES[owner])[name]
    assert isinstance(item, ast.FunctionDef)
    first_line = (getattr(_C, owner).__dict__[name].__doc__ or "").splitlines()[0]
    match = re.fullmatch(r"\w+\((.*)\) -> (.*)", first_line)
    assert match, first_line
    parsed = ast.parse(f"def f({match[1]}): ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    assert [a.arg for a in parsed.args.args] == [a.arg for a in item.args.args]
    assert [ast.unparse(d) for d in parsed.args.defaults] == [
        ast.unparse(d) for d in item.args.defaults
    ]
    assert item.returns is not None
    assert bare(match[2]) == ast.unparse(item.returns)
