"""What AVMP's code takes from vLLM, told by both sources alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from avmp_vllm.doctor.source import Found, Function, Gone, SourceTree, statements

ROOT = Path(__file__).parents[2]
OWN = SourceTree(ROOT)


def modules() -> Iterator[str]:
    """AVMP's modules."""
    for path in sorted((ROOT / "avmp_vllm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__")


def functions(node: ast.AST) -> Iterator[Function]:
    """All functions in a module or class, nested ones too."""
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield part


# -- imports ---------------------------------------------------------------------------------------


def imports(module: str) -> Iterator[tuple[str, str, str]]:
    """Names that a module of AVMP's takes from vLLM: its own name for it, module, name there."""
    for node in ast.walk(OWN.module(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield alias.asname or alias.name, node.module or "", alias.name


def uses(module: str, vllm: SourceTree) -> Iterator[tuple[str, str]]:
    """Module and name of all that a module imports from vLLM, or reads of a module of vLLM's."""
    tree = OWN.module(module)
    for local, source, name in imports(module):
        yield source, name
        if vllm.is_module(f"{source}.{name}"):
            for part in ast.walk(tree):
                if (
                    isinstance(part, ast.Attribute)
                    and isinstance(part.value, ast.Name)
                    and part.value.id == local
                ):
                    yield f"{source}.{name}", part.attr


# -- subclasses ------------------------------------------------------------------------------------


@dataclass
class Subclass:
    """A class of AVMP's that is derived from vLLM's.

    Attributes:
        cls: The class.
        own: It and those of AVMP's that it is derived from.
        stock: Those of vLLM's, nearest first.
    """

    cls: Found
    own: list[Found]
    stock: list[Found]

    @property
    def name(self) -> str:
        """``module:Class``."""
        return f"{self.cls.module}:{getattr(self.cls.node, 'name', '')}"


def _lineage(cls: Found, vllm: SourceTree) -> Subclass:
    found = Subclass(cls, [cls], [])
    assert isinstance(cls.node, ast.ClassDef)
    for base in cls.node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if not isinstance(plain, ast.Name):
            continue
        try:
            parent = OWN.definition(cls.module, plain.id)
        except Gone:
            continue
        if isinstance(parent.node, ast.ClassDef):
            above = _lineage(parent, vllm)
        elif isinstance(parent.node, ast.ImportFrom) and parent.module.split(".")[0] == "vllm":
            name = next(
                alias.name
                for alias in parent.node.names
                if (alias.asname or alias.name) == plain.id
            )
            above = Subclass(parent, [], vllm.bases(vllm.definition(parent.module, name)))
        else:
            continue
        found.own += [each for each in above.own if each not in found.own]
        # As Python's order has it: what is derived from another stands before it.
        found.stock = [each for each in found.stock if each not in above.stock] + above.stock
    return found


def subclasses(vllm: SourceTree) -> list[Subclass]:
    """All of AVMP's classes that are derived from vLLM's."""
    found = [
        _lineage(Found(module, node), vllm)
        for module in modules()
        for node in statements(OWN.module(module).body)
        if isinstance(node, ast.ClassDef)
    ]
    return [each for each in found if each.stock]


def overridden(subclass: Subclass, vllm: SourceTree) -> Iterator[tuple[str, Function, Function]]:
    """Methods of vLLM's that a class of AVMP's stands before: where, AVMP's and vLLM's."""
    seen: set[str] = set()
    for own in subclass.own:
        assert isinstance(own.node, ast.ClassDef)
        for method in statements(own.node.body):
            if not isinstance(method, Function) or method.name in seen:
                continue
            seen.add(method.name)
            for cls in subclass.stock:
                assert isinstance(cls.node, ast.ClassDef)
                stock = next(
                    (
                        node
                        for node in statements(cls.node.body)
                        if isinstance(node, Function) and node.name == method.name
                    ),
                    None,
                )
                if stock is not None:
                    yield f"{cls.module}:{cls.node.name}.{method.name}", method, stock
                    break


# -- calls -----------------------------------------------------------------------------------------


def refusal(ours: Function, stock: Function) -> str:
    """How a call that vLLM's function takes may not fit AVMP's; empty if every one does."""
    a, b = ours.args, stock.args
    our_places = [p.arg for p in (*a.posonlyargs, *a.args)]
    stock_places = [p.arg for p in (*b.posonlyargs, *b.args)]
    our_names = {*our_places, *(p.arg for p in a.kwonlyargs)}
    for place, name in enumerate(stock_places):
        if place >= len(our_places):
            if a.vararg is None:
                return f"has no place for {name}"
            if name not in our_names and a.kwarg is None and place >= _required(stock):
                return f"does not take {name} by name"
        elif our_places[place] != name:
            return f"has {our_places[place]} in the place of {name}"
    for parameter in b.kwonlyargs:
        if parameter.arg not in our_names and a.kwarg is None:
            return f"does not take {parameter.arg} by name"
    missing = our_places[len(stock_places) : _required(ours)]
    return f"needs {missing[0]}" if missing else ""


def _required(function: Function) -> int:
    """Number of parameters without a default that may be given by place."""
    args = function.args
    return len(args.posonlyargs) + len(args.args) - len(args.defaults)


# -- attributes ------------------------------------------------------------------------------------


def unknown_of_self(subclass: Subclass, vllm: SourceTree) -> set[str]:
    """Attributes of ``self`` that a class of AVMP's reads, and that neither side has."""
    known = set(dir(torch.nn.Module))
    for own in subclass.own:
        known |= OWN.attributes(own)
        assert isinstance(own.node, ast.ClassDef)
        known |= {
            node.target.id
            for node in own.node.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            if node.value is not None or _declares_own(node, own)
        }
    for stock in subclass.stock:
        known |= vllm.attributes(stock)
    read = {
        part.attr
        for function in functions(subclass.cls.node)
        for part in ast.walk(function)
        if isinstance(part, ast.Attribute)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }
    return read - known - _registered(subclass)


def _registered(subclass: Subclass) -> set[str]:
    """Names of a torch module's buffers."""
    return {
        part.args[0].value
        for own in subclass.own
        for part in ast.walk(own.node)
        if isinstance(part, ast.Call)
        and ast.unparse(part.func) == "self.register_buffer"
        and isinstance(part.args[0], ast.Constant)
    }


def _declares_own(node: ast.AnnAssign, own: Found) -> bool:
    """Whether a bare annotation names a type of AVMP's, which vLLM then does not provide."""
    return "AVMP" in ast.unparse(node.annotation) and bool(own.module)


class Reader:
    """Follows the types of vLLM's that AVMP's functions name, and what they read of them."""

    def __init__(self, module: str, vllm: SourceTree) -> None:
        self._vllm = vllm
        self._types: dict[str, Found] = {}
        for local, source, name in imports(module):
            try:
                found = vllm.definition(source, name)
            except Gone:
                continue  # told by the test of imports
            if isinstance(found.node, ast.ClassDef):
                self._types[local] = found
        self._module = module

    def unknown(self) -> Iterator[str]:
        """A line for each attribute that a class of vLLM's does not have."""
        for function in functions(OWN.module(self._module)):
            args = function.args
            known = {
                arg.arg: found
                for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)
                if (found := self._named(arg.annotation)) is not None
            }
            yield from self._read(function, known)

    def _named(self, annotation: ast.expr | None) -> Found | None:
        if isinstance(annotation, ast.BinOp):  # X | None
            return self._named(annotation.left)
        return self._types.get(annotation.id) if isinstance(annotation, ast.Name) else None

    def _read(self, function: Function, known: dict[str, Found]) -> Iterator[str]:
        narrowed = set()
        for part in ast.walk(function):
            if isinstance(part, ast.Assign) and len(part.targets) == 1:
                target, value = part.targets[0], part.value
                pairs = (
                    zip(target.elts, value.elts, strict=False)
                    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                    else ((target, value),)
                )
                for name, given in pairs:
                    if isinstance(name, ast.Name):
                        found = self._type_of(given, known)
                        if found is not None:
                            known[name.id] = found
                        else:
                            known.pop(name.id, None)
            elif isinstance(part, ast.Call) and ast.unparse(part.func) in ("isinstance", "hasattr"):
                narrowed.add(ast.unparse(part.args[0]))
        known = {name: found for name, found in known.items() if name not in narrowed}
        for part in ast.walk(function):
            if isinstance(part, ast.Attribute):
                owner = self._type_of(part.value, known)
                if owner is not None and part.attr not in self._attributes(owner):
                    where = f"{self._module}:{part.lineno}"
                    yield f"{where} reads {getattr(owner.node, 'name', '')}.{part.attr}"

    def _attributes(self, cls: Found) -> set[str]:
        return self._vllm.attributes(cls) | set(dir(tuple)) | set(dir(object))

    def _type_of(self, value: ast.expr, known: dict[str, Found]) -> Found | None:
        if isinstance(value, ast.Name):
            return known.get(value.id)
        if not isinstance(value, ast.Attribute):
            return None
        owner = self._type_of(value.value, known)
        if owner is None:
            return None
        try:
            member = self._vllm.member(owner, value.attr)
            if not isinstance(member.node, ast.AnnAssign):
                return None
            annotation = member.node.annotation
            if isinstance(annotation, ast.BinOp):
                annotation = annotation.left
            if not isinstance(annotation, ast.Name):
                return None
            found = self._vllm.definition(member.module.split(":")[0], annotation.id)
        except Gone:
            return None
        return found if isinstance(found.node, ast.ClassDef) else None
