"""vLLM's source, read without importing it.

A release that cannot be imported here, because it was built for other hardware or other libraries,
can be looked at as well as the one that is installed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Gone(LookupError):
    """What was looked for is not in the source; the message names the part that is missing."""


class Found(NamedTuple):
    """A definition and the module that holds it."""

    module: str
    node: ast.stmt


def parameters(function: Function) -> tuple[str, ...]:
    """Names of a function's parameters, in the order of ``inspect.signature``."""
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    names += [args.vararg.arg] if args.vararg else []
    names += [a.arg for a in args.kwonlyargs]
    names += [args.kwarg.arg] if args.kwarg else []
    return tuple(names)


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those under its conditions."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from statements((*node.body, *node.orelse))
        elif isinstance(node, ast.Try):
            handlers = (each for handler in node.handlers for each in handler.body)
            yield from statements((*node.body, *handlers, *node.orelse, *node.finalbody))


def _names(target: ast.expr) -> Iterator[str]:
    for part in ast.walk(target):
        if isinstance(part, ast.Name):
            yield part.id


def _defines(node: ast.stmt, name: str) -> bool:
    """Whether a statement defines a name itself."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name == name
    if isinstance(node, ast.Assign):
        return any(name in _names(target) for target in node.targets)
    return isinstance(node, ast.AnnAssign) and name in _names(node.target)


class SourceTree:
    """The Python files of a package.

    Args:
        root: Folder that holds the package.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, ast.Module] = {}

    @classmethod
    def installed(cls, package: str = "vllm") -> SourceTree:
        """That of an installed package.

        Raises:
            Gone: There is none.
        """
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise Gone(f"no package {package}")
        return cls(Path(spec.submodule_search_locations[0]).parent)

    def _path(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None

    def digest(self, where: str) -> str:
        """A short hash of what a definition says, without its docstrings and lines of comment.

        Of the text and not of the syntax tree, so that every Python gives the same.

        Raises:
            Gone: It is not there.
        """
        found = self.find(where)
        path = self._path(found.module.split(":")[0])
        assert path is not None
        decorators = getattr(found.node, "decorator_list", [])
        first = min([found.node.lineno, *(each.lineno for each in decorators)])
        lines = dict(enumerate(path.read_text("utf-8").splitlines(), start=1))
        kept = set(range(first, (found.node.end_lineno or first) + 1))
        for part in ast.walk(found.node):
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                head = part.body[0]
                if isinstance(head, ast.Expr) and isinstance(head.value, ast.Constant):
                    kept -= set(range(head.lineno, (head.end_lineno or head.lineno) + 1))
        text = [lines[number].strip() for number in sorted(kept)]
        said = [line for line in text if line and not line.startswith("#")]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]

    def is_module(self, name: str) -> bool:
        """Whether there is a module of that name."""
        return self._path(name) is not None

    def module(self, name: str) -> ast.Module:
        """A module's syntax tree.

        Raises:
            Gone: There is no such module.
        """
        if name not in self._modules:
            path = self._path(name)
            if path is None:
                raise Gone(f"no module {name}")
            self._modules[name] = ast.parse(path.read_text("utf-8"))
        return self._modules[name]

    def definition(self, module: str, name: str) -> Found:
        """Where a module's name is defined, looked for through its imports.

        Raises:
            Gone: The module or the name is not there.
        """
        found: Found | None = None
        for node in statements(self.module(module).body):
            if _defines(node, name):
                found = Found(module, node)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self._imported(module, node, alias.name) or found
        if found is None:
            raise Gone(f"no {name} in {module}")
        return found

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Found | None:
        source = node.module or ""
        if node.level:
            path = self._path(module)
            assert path is not None
            up = node.level - (path.name == "__init__.py")
            parent = module.split(".")[: len(module.split(".")) - up]
            source = ".".join([*parent, *([source] if source else [])])
        if self._path(source) is None:
            return Found(source, node)  # another package's
        if self._path(f"{source}.{name}") is not None:
            return Found(f"{source}.{name}", node)
        return self.definition(source, name)

    def has(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` would work, as far as the source tells."""
        if self._path(f"{module}.{name}") is not None:
            return True
        try:
            self.definition(module, name)
        except Gone:
            tree = self._modules.get(module)
            return tree is not None and any(
                isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
                for node in statements(tree.body)
            )
        return True

    def bases(self, cls: Found) -> list[Found]:
        """A class and those of this package that it is derived from, nearest first."""
        assert isinstance(cls.node, ast.ClassDef)
        order, ahead = [cls], []
        for base in cls.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name):
                try:
                    found = self.definition(cls.module, plain.id)
                except Gone:
                    continue  # of the standard library
                if isinstance(found.node, ast.ClassDef):
                    ahead.append(found)
        for base_class in ahead:
            order += [each for each in self.bases(base_class) if each not in order]
        return order

    def member(self, cls: Found, name: str) -> Found:
        """Where a class, or the nearest of those that it is derived from, defines a name.

        Raises:
            Gone: None does.
        """
        for each in self.bases(cls):
            assert isinstance(each.node, ast.ClassDef)
            for node in statements(each.node.body):
                if _defines(node, name):
                    return Found(f"{each.module}:{each.node.name}", node)
        raise Gone(f"no {name} in {_class_name(cls)}")

    def find(self, where: str) -> Found:
        """The definition at ``module:path``.

        Raises:
            Gone: It is not there.
        """
        module, path = where.split(":")
        first, *rest = path.split(".")
        found = self.definition(module, first)
        for name in rest:
            found = self.member(found, name)
        return found

    def attributes(self, cls: Found) -> set[str]:
        """Names that a class's objects have: members, and what methods assign to ``self``."""
        names: set[str] = set()
        for each in self.bases(cls):
            assert isinstance(each.node, ast.ClassDef)
            for node in statements(each.node.body):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    names.add(node.name)
                    names |= _assigned(node)
                elif isinstance(node, ast.Assign):
                    names.update(name for target in node.targets for name in _names(target))
                elif isinstance(node, ast.AnnAssign):
                    names.update(_names(node.target))
        return names


def _class_name(cls: Found) -> str:
    return f"{cls.module}:{getattr(cls.node, 'name', '')}"


def _assigned(function: Function) -> set[str]:
    """Attributes of ``self`` that a method assigns."""
    return {
        part.attr
        for part in ast.walk(function)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }
