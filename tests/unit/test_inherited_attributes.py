"""Attributes that classes of ours below SGLang's read of themselves exist: mypy, to which SGLang's
classes are `Any`, takes every name there."""

import ast
import functools
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest
from sglang.srt.managers.data_parallel_controller import DataParallelController

from pascal_sglang.cluster.controller import PascalController

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "pascal_sglang").rglob("*.py")
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def methods(node):
    """The methods of a class, each with the name of its instance, or of its class."""
    for method in node.body:
        if isinstance(method, FUNCTIONS):
            static = any(getattr(d, "id", "") == "staticmethod" for d in method.decorator_list)
            arguments = [*method.args.posonlyargs, *method.args.args]
            if arguments and not static:
                yield method, arguments[0].arg


def own(node, context):
    """Attributes of the instance that the methods of a class read (`ast.Load`) or assign
    (`ast.Store`)."""
    return {
        each.attr
        for method, instance in methods(node)
        for each in ast.walk(method)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, context)
        and isinstance(each.value, ast.Name)
        and each.value.id == instance
    }


def inherited(node):
    """Attributes that the methods of a class read of `super()`."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.value, ast.Call)
        and getattr(each.value.func, "id", "") == "super"
    }


def declared(node):
    """What stands in the body of a class, and what its methods assign."""
    found = own(node, ast.Store)
    for each in node.body:
        if isinstance(each, FUNCTIONS):
            found.add(each.name)
        elif isinstance(each, ast.Assign):
            found |= {target.id for target in each.targets if isinstance(target, ast.Name)}
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            found.add(each.target.id)
    return found


@functools.cache
def known(cls):
    """Every attribute that a class or one above it has or assigns."""
    found = set(dir(cls))
    for each in cls.__mro__:
        try:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except (OSError, TypeError):  # Made by a library, or not in Python.
            continue
        found |= declared(node)
    return found


def missing(node, bases):
    """What a class reads of itself that it does not have."""
    above = set().union(*map(known, bases))
    return (own(node, ast.Load) - above - declared(node)) | (inherited(node) - above)


def written(name):
    """The classes that inherit in a module of ours, those inside functions too."""
    tree = ast.parse(FILES[name].read_text())
    return [each for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and each.bases]


def evaluated(name, expressions):
    """What they are where they stand; None for a value that its function finds out."""
    names = dict(vars(importlib.import_module(name)))
    for each in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(each, ast.ImportFrom) and each.module.startswith("sglang"):
            exec(compile(ast.Module([each], []), name, "exec"), names)
    for expression in expressions:
        try:
            yield eval(ast.unparse(expression), names)
        except NameError:
            yield None


def below_sglang(name):
    """The classes of a module of ours below one of SGLang's, each with what it inherits from."""
    for node in written(name):
        bases = [base for base in evaluated(name, node.bases) if isinstance(base, type)]
        above = [each.__module__ for base in bases for each in base.__mro__]
        if any(module.startswith("sglang.") for module in above):
            # Under Ray SGLang's controller is made when ours stands in its parent's place.
            ray = any(base.__module__.startswith("sglang.srt.ray.") for base in bases)
            is_controller = ray and any(issubclass(base, DataParallelController) for base in bases)
            yield node, [*bases, PascalController] if is_controller else bases


@pytest.mark.parametrize("name", filter(written, FILES))
def test_what_a_class_reads_of_itself_is_there(name):
    found = {node.name: missing(node, bases) for node, bases in below_sglang(name)}
    assert {name: attributes for name, attributes in found.items() if attributes} == {}


def test_they_are_all_looked_at():
    """Those that only text names as SGLang's are found as its; one class has a base that is not
    known before a server runs."""
    seen = {node.name for name in filter(written, FILES) for node, _ in below_sglang(name)}
    assert len(seen) > 12
    assert {"PascalScheduler", "PascalController", "Controller", "PascalSchedulerActor"} <= seen
    unknown = {
        node.name
        for name in filter(written, FILES)
        for node in written(name)
        if None in evaluated(name, node.bases)
    }
    assert unknown == {"PascalSignalHandler"}


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("def schedulers(self):\n  return [*self.workers, *self._homes]", {"_homes"}),
        ("def schedulers(self):\n  return lambda: self._homes", {"_homes"}),
        ("def schedulers(self):\n  return super().schedulers()", {"schedulers"}),
        ("def __init__(self):\n  self._homes = []\n def homes(self):\n  return self._homes", set()),
        ("_homes: list\n def homes(self):\n  return self._homes", set()),
    ],
)
def test_one_that_is_not_there_is_found(body, wrong):
    (node,) = ast.parse(f"class Planted(DataParallelController):\n {body}").body
    assert missing(node, [DataParallelController]) == wrong
