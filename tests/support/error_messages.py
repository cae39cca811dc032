"""The messages of the errors that the package raises, read from its source: f-strings with `HOLE` for each value.

Names are followed to what they are bound to: local variables, constants of this module or another one of fedbpt,
parameters (to the arguments of every call in the module) and calls of the module's functions (to what they return).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

import fedbpt
import fedbpt.errors

PACKAGE = Path(fedbpt.__file__).parent
HOLE = "…"
MAX_DEPTH = 8
MAX_VARIANTS = 64
MESSAGE_ARGUMENTS = ("message", "reason")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Message:
    """``text``: as shown, or as ``public`` where the error is told to other machines."""

    file: str
    line: int
    error: str
    text: str
    is_public: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.error}: {self.text!r}"


@dataclass(frozen=True)
class Module:
    """``path``: relative to the package."""

    path: str
    tree: ast.Module

    @cached_property
    def functions(self) -> dict[str, list[Function]]:
        """Functions and methods by name."""
        found: dict[str, list[Function]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                found.setdefault(node.name, []).append(node)
        return found

    @cached_property
    def owner(self) -> dict[ast.AST, Function]:
        """The innermost function that each node is in."""
        owner: dict[ast.AST, Function] = {}

        def visit(node: ast.AST, within: Function | None) -> None:
            for child in ast.iter_child_nodes(node):
                if within is not None:
                    owner[child] = within
                visit(child, child if isinstance(child, Function) else within)

        visit(self.tree, None)
        return owner

    @cached_property
    def calls(self) -> dict[str, list[ast.Call]]:
        """Calls by the name of what is called."""
        found: dict[str, list[ast.Call]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                found.setdefault(called(node), []).append(node)
        return found

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        return {name: value for node in self.tree.body for name, value in bindings(node)}

    @cached_property
    def imports(self) -> dict[str, str]:
        """Name → path of the module of fedbpt that it comes from."""
        return {
            alias.asname or alias.name: "/".join((node.module or "").split(".")[1:]) + ".py"
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedbpt.")
            for alias in node.names
        }


@dataclass
class Package:
    modules: dict[str, Module] = field(
        default_factory=lambda: {
            path.relative_to(PACKAGE).as_posix(): Module(
                path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_bytes())
            )
            for path in sorted(PACKAGE.rglob("*.py"))
        }
    )

    @cached_property
    def errors(self) -> set[str]:
        """Names of the subclasses of `FedbptError`, and of `NoReplyError`, whose text becomes one's."""
        names = {
            name
            for name, value in vars(fedbpt.errors).items()
            if inspect.isclass(value) and issubclass(value, fedbpt.errors.FedbptError)
        }
        names.add("NoReplyError")
        classes = [
            node for module in self.modules.values() for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)
        ]
        while True:
            more = {node.name for node in classes if any(name_of(base) in names for base in node.bases)} - names
            if not more:
                return names
            names |= more

    def messages(self) -> Iterator[Message]:
        """Every message that the source writes. A missing extra's is written by `MissingExtraError` itself."""
        for module in self.modules.values():
            for name in sorted(self.errors - {"MissingExtraError"}):
                for call in module.calls.get(name, []):
                    for argument, is_public in message_arguments(call):
                        for text in self.texts(argument, module):
                            if text.strip(f"{HOLE}: ()") or not text:
                                yield Message(module.path, call.lineno, name, text, is_public)

    def texts(self, node: ast.expr, module: Module, depth: int = 0) -> list[str]:
        """The texts that ``node`` may be, at most `MAX_VARIANTS`."""
        if depth > MAX_DEPTH:
            return [HOLE]
        found: list[str] = []
        match node:
            case ast.Constant(str(value)):
                found = [value]
            case ast.JoinedStr(values):
                found = self._joined(values, module, depth)
            case ast.FormattedValue(value) if node.conversion == -1 and node.format_spec is None:
                found = self.texts(value, module, depth + 1)
            case ast.BinOp(left, ast.Add(), right):
                found = self._joined([left, right], module, depth)
            case ast.IfExp(_, body, orelse):
                found = self.texts(body, module, depth + 1) + self.texts(orelse, module, depth + 1)
            case ast.BoolOp(ast.Or(), values):
                found = [text for value in values for text in self.texts(value, module, depth + 1)]
            case ast.Name(name):
                found = self._named(name, node, module, depth)
            case ast.Call(ast.Attribute(inner, "strip" | "lstrip" | "rstrip")):
                found = self.texts(inner, module, depth + 1)
            case ast.Call():
                found = self._returned(called(node), module, depth)
        return list(dict.fromkeys(found))[:MAX_VARIANTS] or [HOLE]

    def _joined(self, parts: list[ast.expr], module: Module, depth: int) -> list[str]:
        variants = [self.texts(part, module, depth + 1) for part in parts]
        return ["".join(chosen) for chosen, _ in zip(product(*variants), range(MAX_VARIANTS), strict=False)]

    def _named(self, name: str, node: ast.AST, module: Module, depth: int) -> list[str]:
        function = module.owner.get(node)
        while function is not None:
            bound = [value for each in ast.walk(function) for key, value in bindings(each) if key == name]
            if bound:
                return [text for value in bound for text in self.texts(value, module, depth + 1)]
            parameters = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
            if name in parameters or name in [each.arg for each in function.args.kwonlyargs]:
                return self._given(name, parameters, function, module, depth)
            function = module.owner.get(function)
        if name in module.constants:
            return self.texts(module.constants[name], module, depth + 1)
        source = self.modules.get(module.imports.get(name, ""))
        if source is not None and name in source.constants:
            return self.texts(source.constants[name], source, depth + 1)
        return [HOLE]

    def _given(self, name: str, parameters: list[str], function: Function, module: Module, depth: int) -> list[str]:
        """What the module's calls of ``function`` give as ``name``."""
        found: list[str] = []
        for call in module.calls.get(function.name, []):
            positional = parameters[1:] if parameters[:1] in (["self"], ["cls"]) else parameters
            given = dict(zip(positional, call.args, strict=False))
            given.update((each.arg, each.value) for each in call.keywords if each.arg is not None)
            if name in given:
                found += self.texts(given[name], module, depth + 1)
        return found

    def _returned(self, name: str, module: Module, depth: int) -> list[str]:
        functions = module.functions.get(name, [])
        if len(functions) != 1 or functions[0].returns is None or "str" not in ast.unparse(functions[0].returns):
            return [HOLE]
        returned = [node for node in ast.walk(functions[0]) if isinstance(node, ast.Return) and node.value is not None]
        return [
            text for node in returned if node.value is not None for text in self.texts(node.value, module, depth + 1)
        ]


def bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that one statement binds, each with its value."""
    match node:
        case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
            yield name, value
        case ast.Assign([ast.Tuple(names)], ast.Tuple(values)):
            for target, value in zip(names, values, strict=False):
                if isinstance(target, ast.Name):
                    yield target.id, value
        case ast.NamedExpr(ast.Name(name), value):
            yield name, value
        case ast.For(ast.Name(name)) | ast.comprehension(ast.Name(name)):
            yield name, ast.Tuple([])


def message_arguments(call: ast.Call) -> Iterator[tuple[ast.expr, bool]]:
    """The message of an error's constructor, and what it tells other machines (True)."""
    if call.args:
        yield call.args[0], False
    for keyword in call.keywords:
        if keyword.arg in MESSAGE_ARGUMENTS:
            yield keyword.value, False
        if keyword.arg == "public":
            yield keyword.value, True


def called(call: ast.Call) -> str:
    return name_of(call.func)


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
