"""Reads a launch script in Python: follows it up to the call that starts training, and runs nothing of it."""

from __future__ import annotations

import ast
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from miles.migrate.launch import Launch
from miles.migrate.python_expressions import literal, unpack
from miles.migrate.python_objects import Objects
from miles.migrate.python_values import Class, Function, Instance, LoopControl, Module, Returned, Stopped, Unknown

_LAUNCHERS = ("execute_train", "execute_train_cmd")
_RUN_NOTHING = (
    "exec_command",
    "exec_command_cpu",
    "exec_command_all_ray_node",
    "convert_checkpoint",
    "hf_download_dataset",
)
_ENTRIES = ("execute", "train", "full_train", "main", "run")
_MOST_MODULES = 30
_MOST_STEPS = 20_000


def read_python_script(path: pathlib.Path, given: Mapping[str, str]) -> Launch:
    """Return what a script launches when its arguments have the values in `given`. Raises OSError and SyntaxError."""
    launch = Launch(path.resolve())
    _Reader(path.resolve(), launch, given).read()
    return launch


class _Reader(Objects):
    def __init__(self, path: pathlib.Path, launch: Launch, given: Mapping[str, str]) -> None:
        super().__init__(launch, given)
        self._path = path
        self._modules: dict[str, dict[str, Any] | None] = {}
        self._steps = 0

    def read(self) -> None:
        """Follow the script as a program; if that starts nothing, its function with the usual name."""
        tree = ast.parse(self._path.read_text(encoding="utf-8"), str(self._path))
        scope: dict[str, Any] = {"__name__": "__main__", "__file__": str(self._path)}
        try:
            self.run(tree.body, scope)
            for name in _ENTRIES:
                if not self.launch.program and isinstance(scope.get(name), Function):
                    self._enter(scope[name])
        except (Stopped, Returned, LoopControl):
            return

    def _enter(self, function: Function) -> None:
        """Call a function whose arguments a command line would give, with their defaults."""
        assert isinstance(function.node, ast.FunctionDef)
        args: list[Any] = []
        for argument in function.node.args.args[: len(function.node.args.args) - len(function.node.args.defaults)]:
            kind = None if argument.annotation is None else self.value(argument.annotation, function.scope)
            if isinstance(kind, Class):
                args.append(self.instance(kind, {}))
            elif argument.arg in self.given:
                args.append(literal(self.given[argument.arg]))
            else:
                args.append(
                    self.launch.open.new(f"${argument.arg.upper()}", "it is an argument of the script", argument.lineno)
                )
        try:
            self.invoke(function, args, {})
        except Stopped as error:
            self.launch.remark(function.node.lineno, f"{function.node.name} ends early: {error}")

    def attribute_of_module(self, module: Module, name: str) -> Any:
        scope = self._module(module.name)
        if scope is not None and name in scope:
            return scope[name]
        if self._find(f"{module.name}.{name}") is not None:
            return Module(f"{module.name}.{name}")
        raise Unknown

    def _module(self, name: str) -> dict[str, Any] | None:
        """Return the globals of a module whose file is in a folder above the script, or None."""
        if name not in self._modules:
            self._modules[name] = None  # while it is read, and when it cannot be
            path = self._find(name)
            if path is not None and len(self._modules) < _MOST_MODULES:
                scope: dict[str, Any] = {"__name__": name, "__file__": str(path)}
                try:
                    self.run(ast.parse(path.read_text(encoding="utf-8")).body, scope)
                except (Stopped, SyntaxError, UnicodeDecodeError):
                    return None
                self._modules[name] = scope
        return self._modules[name]

    def _find(self, name: str) -> pathlib.Path | None:
        relative = pathlib.Path(*name.split("."))
        for folder in list(self._path.parents)[:8]:
            for path in (folder / relative.with_suffix(".py"), folder / relative / "__init__.py"):
                if path.is_file():
                    return path
        return None

    def run(self, nodes: Sequence[ast.stmt], scope: dict[str, Any]) -> None:
        for node in nodes:
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise Stopped("it takes too long to follow")
            self._statement(node, scope)

    def _statement(self, node: ast.stmt, scope: dict[str, Any]) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, self.value(value, scope, ast.unparse(target)), scope)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self.value(value, scope, ast.unparse(target)), scope)
            case ast.AugAssign(target=target, op=op, value=value):
                changed = ast.copy_location(ast.BinOp(_loaded(target), op, value), node)
                self._assign(target, self.value(changed, scope, ast.unparse(target)), scope)
            case ast.If(test=test, body=body, orelse=orelse):
                self.run(body if self.holds(test, scope) else orelse, scope)
            case ast.For():
                self._for(node, scope)
            case ast.Expr(value=ast.Call() as call):
                self._expression(call, scope)
            case ast.FunctionDef(name=name):
                scope[name] = Function(node, scope.get("__globals__", scope))
            case ast.ClassDef(name=name):
                scope[name] = self.class_of(node, scope)
            case ast.Import(names=names):
                for each in names:
                    scope[each.asname or each.name.partition(".")[0]] = Module(
                        each.name if each.asname else each.name.partition(".")[0]
                    )
            case ast.ImportFrom(module=str() as module, names=names):
                self._import_from(module, names, scope)
            case ast.With(items=items, body=body):
                for item in items:
                    if isinstance(item.optional_vars, ast.Name):
                        scope[item.optional_vars.id] = self.open(item.context_expr, item.optional_vars.id)
                self.run(body, scope)
            case ast.Try(body=body, finalbody=final):
                self.run([*body, *final], scope)
            case ast.Match(subject=subject, cases=cases):
                self._match(subject, cases, scope)
            case ast.Return(value=value):
                raise Returned(None if value is None else self.value(value, scope))
            case ast.Break() | ast.Continue():
                raise LoopControl(type(node).__name__)
            case ast.Raise(exc=error):
                raise Stopped(ast.unparse(error) if error is not None else "it raises an error")

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Attribute):
            owner = self.value(target.value, scope)
            if isinstance(owner, Instance):
                owner.values[target.attr] = value
        elif isinstance(target, ast.Subscript):
            owner, key = self.value(target.value, scope), self.value(target.slice, scope)
            if isinstance(owner, dict | list):
                owner[key] = value
        else:
            try:
                unpack(target, value, scope)
            except (TypeError, ValueError):
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        scope[name.id] = self.open(name)

    def _for(self, node: ast.For, scope: dict[str, Any]) -> None:
        items = self.value(node.iter, scope)
        if not isinstance(items, list | tuple | dict | enumerate | zip):
            self.remark(node, f"the loop over {ast.unparse(node.iter)} is not followed", scope)
            return
        for item in list(items):
            unpack(node.target, item, scope)
            try:
                self.run(node.body, scope)
            except LoopControl as control:
                if control.word == "Break":
                    break

    def _expression(self, node: ast.Call, scope: dict[str, Any]) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in _LAUNCHERS:
            self._launch(node, scope)
        elif ast.unparse(node.func) == "typer.run" and node.args:
            function = self.value(node.args[0], scope)
            if isinstance(function, Function):
                self._enter(function)
        elif name not in _RUN_NOTHING:
            self.value(node, scope)

    def _launch(self, node: ast.Call, scope: dict[str, Any]) -> None:
        given = {keyword.arg: self.value(keyword.value, scope) for keyword in node.keywords if keyword.arg}
        text = given.get("train_args", self.value(node.args[0], scope) if node.args else "")
        script = given.get("train_script", "train.py")
        try:
            words = [word for word in shlex.split(text) if word] if isinstance(text, str) else []
        except ValueError as error:
            self.launch.remark(node.lineno, f"the arguments cannot be split into words: {error}")
            return
        program = script if isinstance(script, str) and script.endswith(".py") else "train.py"
        self.launch.starts([program, *words], node.lineno)
        if (kind := given.get("megatron_model_type")) is not None:
            text = f"the flags of model type {self.launch.open.plain(str(kind))} are not needed: config.json has them"
            self.launch.remark(node.lineno, text)
        variables = given.get("extra_env_vars")
        if isinstance(variables, dict):
            self.launch.environment |= {str(name): str(value) for name, value in variables.items()}

    def _import_from(self, module: str, names: list[ast.alias], scope: dict[str, Any]) -> None:
        for each in names:
            try:
                scope[each.asname or each.name] = self.attribute_of_module(Module(module), each.name)
            except Unknown:
                continue

    def _match(self, subject: ast.expr, cases: list[ast.match_case], scope: dict[str, Any]) -> None:
        value = self.value(subject, scope)
        for case in cases:
            if self.matches(case.pattern, value, scope) and (case.guard is None or self.holds(case.guard, scope)):
                self.run(case.body, scope)
                return


def _loaded(target: ast.expr) -> ast.expr:
    """Return the target of an assignment as an expression that reads it."""
    return ast.parse(ast.unparse(target), mode="eval").body
