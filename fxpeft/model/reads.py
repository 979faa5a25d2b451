"""What a forward reads of the modules below it: a module whose weight is read and which is called nowhere has no site.

Read off the source of the classes around a module: which of its attributes their forwards, and what these call of
themselves, take. No input is needed and nothing is run, so both branches of an ``if`` count. Each class is read once;
one whose code names none of the module's parameters is not parsed at all.
"""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fxpeft.passes.live import base_class, given_forward
from fxpeft.passes.live.reading import ASKS

Chain = tuple[str, ...]  # attributes from ``self`` on; ``*`` is an item of the one before

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_QUESTIONS = frozenset(("isinstance", "hasattr", "type", "id", "getattr"))
_EVERYTHING = frozenset(("_modules", "children", "named_children", "modules", "named_modules", "get_submodule"))
_names: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()
_chains: WeakKeyDictionary[type, frozenset[Chain]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Past:
    """A module's weight is read past its forward.

    Args:
        reader: the class that does it. called: whether the module is called as well, as far as the code tells.
    """

    reader: str
    called: bool


def read_past(name: str, modules: Mapping[str, nn.Module]) -> Past | None:
    """Who reads a module's parameters without calling it; ``None`` where nobody does.

    Args:
        modules: the base's modules, named.
    """
    tensors = {leaf for leaf, value in modules[name]._parameters.items() if value is not None}
    around = [(outer, modules[outer]) for outer in _outer(name) if outer in modules]
    if not any(tensors & _named(base_class(module)) for _, module in around):
        return None
    reader, called = "", False
    for outer, module in around:
        path = name[len(outer) :].lstrip(".").split(".")
        if given_forward(module) is not None:  # somebody's own, which may call anything
            called = True
            continue
        for chain in _read(base_class(module)):
            if chain[0] in _EVERYTHING and len(path) == 1:
                called = True
            if any(part not in (own, "*") for part, own in zip(chain, path, strict=False)):
                continue
            rest = chain[len(path) :]
            if len(chain) < len(path):  # a list that is handed on or iterated over, with all that is in it
                called |= all(isinstance(modules.get(inner), CONTAINERS) for inner in _between(name, path, chain))
            elif not rest or rest[0] in ("forward", "__call__", *_EVERYTHING):
                called = True
            elif rest[0] in tensors and not (len(rest) > 1 and rest[1] in ASKS):
                reader = reader or _displayed(base_class(module))
    return Past(reader, called) if reader else None


def idle(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why an adapter at a module would do nothing, or ``None``."""
    past = read_past(name, modules)
    if past is None or past.called:
        return None
    return f"{past.reader} reads this module's weight without calling it, so adapting it would do nothing"


def _outer(name: str) -> Iterator[str]:
    """Names of the modules around one, from the next to the root."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _between(name: str, path: list[str], chain: Chain) -> Iterator[str]:
    """Names of the modules from the one that a chain ends at to the one right around the named one."""
    inner = name
    for _ in range(len(path) - len(chain)):
        inner = inner.rpartition(".")[0]
        yield inner


def _displayed(cls: type) -> str:
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__


def _named(cls: type) -> frozenset[str]:
    """Every attribute and global that a class's forward, and what it calls of itself, names."""
    if cls not in _names:
        _names[cls] = frozenset(n for function in _reachable(cls) for n in _names_in(function.__code__))
    return _names[cls]


def _read(cls: type) -> frozenset[Chain]:
    """Every attribute chain that a class's forward, and what it calls of itself, takes from ``self``."""
    if cls not in _chains:
        _chains[cls] = frozenset(chain for function in _reachable(cls) for chain in _taken_by(function))
    return _chains[cls]


def _taken_by(function: FunctionType) -> set[Chain]:
    try:
        return _Reads(ast.parse(textwrap.dedent(inspect.getsource(function)))).chains
    except (OSError, TypeError, SyntaxError):  # typed in, or made by a program
        return set(_in_bytecode(function.__code__, function.__code__.co_varnames[:1]))


def _in_bytecode(code: CodeType, first: tuple[str, ...]) -> Iterator[Chain]:
    """The chains that stand there in one piece; a name or a loop for a module counts as handing it on."""
    chain: Chain | None = None
    for step in dis.get_instructions(code):
        if chain is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, str(step.argval))
            continue
        if chain:
            yield chain
        loaded: Any = step.argval if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else None
        last = loaded[-1:] if isinstance(loaded, tuple) else (loaded,)  # some load two names at once
        chain = () if last == first else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _in_bytecode(constant, first)


def _reachable(cls: type) -> list[FunctionType]:
    """The class's ``forward`` and the methods and properties that it names, directly or not; nn.Module's own aside."""
    own = [vars(c) for c in cls.__mro__ if c not in (nn.Module, object)]
    found: dict[FunctionType, None] = {}
    names, seen = ["forward"], {"forward"}
    while names:
        name = names.pop()
        for attributes in own:
            value: Any = attributes.get(name)
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and function not in found:
                found[function] = None
                new = _names_in(function.__code__) - seen
                seen |= new
                names += new
    return list(found)


def _names_in(code: CodeType) -> set[str]:
    names = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
        elif isinstance(constant, str):
            names.add(constant)  # getattr(self, "proj")
    return names


class _Reads(ast.NodeVisitor):
    """Collects the attribute chains of one function's first argument, through names that stand for one of them."""

    def __init__(self, tree: ast.Module) -> None:
        self.chains: set[Chain] = set()
        self.known: dict[str, Chain] = {}
        function = tree.body[0]
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        arguments = [*function.args.posonlyargs, *function.args.args]
        if not arguments:
            return
        self.known[arguments[0].arg] = ()
        bound = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        self.once = {n for n in bound if bound.count(n) == 1}
        for statement in function.body:
            self.visit(statement)

    def _chain(self, node: ast.AST) -> Chain | None:
        """The chain that an expression is, or ``None``."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._chain(node.value)
            return None if base is None else (*base, node.attr)
        if isinstance(node, ast.Subscript):
            base = self._chain(node.value)
            return None if base is None else (*base, "*")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            base = self._chain(node.args[0]) if len(node.args) > 1 else None
            if base is not None:
                leaf = node.args[1]
                return (*base, str(leaf.value) if isinstance(leaf, ast.Constant) else "*")
        return None

    def _stands_for(self, target: ast.AST, value: ast.AST, *item: str) -> bool:
        """Let a name that is bound once stand for the chain that it is bound to."""
        chain = self._chain(value)
        if chain is None or not isinstance(target, ast.Name) or target.id not in self.once:
            return False
        self.known[target.id] = (*chain, *item)
        return True

    def _loop(self, target: ast.AST, iterated: ast.expr) -> bool:
        match iterated, target:
            case ast.Call(func=ast.Name(id="enumerate"), args=[listed, *_]), ast.Tuple(elts=[_, item]):
                target, iterated = item, listed
        return self._stands_for(target, iterated, "*")

    def visit_Assign(self, node: ast.Assign) -> None:
        if len(node.targets) != 1 or not self._stands_for(node.targets[0], node.value):
            self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        if not self._loop(node.target, node.iter):
            self.visit(node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        if not self._loop(node.target, node.iter):
            self.visit(node.iter)
        for condition in node.ifs:
            self.visit(condition)

    def _comprehension(self, node: Any) -> None:
        for generator in node.generators:
            self.visit(generator)
        for part in ("elt", "key", "value"):
            if hasattr(node, part):
                self.visit(getattr(node, part))

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        asks = isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS and self._chain(node) is None
        if not asks:
            self._take(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._take(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._take(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._take(node)

    def _take(self, node: Any) -> None:
        chain = self._chain(node)
        if chain is None:
            self.generic_visit(node)
            return
        if chain and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            self.chains.add(chain)
        inner: Any = node
        while not isinstance(inner, ast.Name):  # what an item is chosen by is code, too
            if isinstance(inner, ast.Subscript):
                self.visit(inner.slice)
            inner = inner.args[0] if isinstance(inner, ast.Call) else inner.value
