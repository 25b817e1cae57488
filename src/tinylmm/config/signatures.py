"""Which names a class or function takes, read from its source text: nothing is imported, so no torch is loaded.

`transformers` describes a network by a config class with one annotated field a setting; tinylmm's own classes and a user's
take keyword arguments. Where the source cannot tell, the answer is None and the class judges when it is built.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tinylmm.config.targets import package_folder

_BASES = {"PreTrainedConfig", "PretrainedConfig"}
"""Their fields (`architectures`, `dtype`, ...) say how a config was saved or is run, not what the network is."""
_READS = {"pop", "get", "setdefault"}


@dataclass(frozen=True)
class Definition:
    """A class or function with the module it stands in."""

    module: str
    node: ast.ClassDef | ast.FunctionDef


def find_definition(dotted: str) -> Definition | None:
    """Return the class or function that `dotted` names, where its source can be found."""
    module, _, name = dotted.rpartition(".")
    found = _definitions(module).get(name)
    if found is not None:
        return Definition(module, found)
    imported = _imports(module).get(name)
    return find_definition(imported) if imported is not None else None


def argument_names(dotted: str) -> tuple[str, ...] | None:
    """Return the arguments that a class or function takes by name, `self` left out; None where the source does not say."""
    found = find_definition(dotted)
    if found is None:
        return None
    if isinstance(found.node, ast.FunctionDef):
        rest = _unpacked(found)
        return None if rest is None else (*_arguments(found.node), *rest)
    init = next((method for method in _methods(found.node) if method.name == "__init__"), None)
    names = tuple(_arguments(init)[1:]) if init is not None else ()
    if init is not None and init.args.kwarg is None:
        return names
    bases = [argument_names(base) for base in _bases(found)]
    if len(bases) != 1 or bases[0] is None:
        return None
    return (*names, *(name for name in bases[0] if name not in names))


def _unpacked(found: Definition) -> tuple[str, ...] | None:
    """Names behind a function's `**options: Unpack[SomeTypedDict]`; None where `**options` may be anything."""
    assert isinstance(found.node, ast.FunctionDef)
    rest = found.node.args.kwarg
    if rest is None:
        return ()
    typed = rest.annotation
    if isinstance(typed, ast.Subscript) and ast.unparse(typed.value) == "Unpack" and isinstance(typed.slice, ast.Name):
        return config_fields(_resolve(found.module, typed.slice.id))
    return None


def config_fields(dotted: str) -> tuple[str, ...] | None:
    """Return the fields of a config class: its own, its bases', and older names that it still reads; None if not found."""
    found = find_definition(dotted)
    if found is None or isinstance(found.node, ast.FunctionDef):
        return None
    names = dict.fromkeys(_fields(found.node))
    if "rope_parameters" in names:  # older names of what it holds, which every such class still reads
        names |= dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor"))
    for base in _bases(found):
        if base.rpartition(".")[2] not in _BASES:
            names |= dict.fromkeys(config_fields(base) or ())
    return tuple(names)


def nested_configs(dotted: str) -> dict[str, str]:
    """Return field -> dotted config class, for a class whose `sub_configs` names other config classes."""
    found = find_definition(dotted)
    if found is None or isinstance(found.node, ast.FunctionDef):
        return {}
    value = _assigned(found.node, "sub_configs")
    if not isinstance(value, ast.Dict):
        return {}
    pairs = zip(value.keys, value.values, strict=True)
    return {
        str(key.value): _resolve(found.module, name.id)
        for key, name in pairs
        if isinstance(key, ast.Constant) and isinstance(name, ast.Name)
    }


def config_class(model: str) -> str | None:
    """Return the dotted config class of a model's class: of transformers by its tables, of other packages by `config_class`."""
    if model.startswith("transformers."):
        name = model.rpartition(".")[2]
        types = dict.fromkeys(kind for kind, found in _pairs("modeling_auto.py") if found == name)
        configs = dict.fromkeys(filter(None, map(config_class_of_type, types)))
        if len(configs) > 1:  # several types may share a class of one of them, as InternLM3 does Llama's
            configs = {config: None for config in configs if name in _definitions(_modeling(config))}
        return next(iter(configs), None)
    found = find_definition(model)
    while found is not None and isinstance(found.node, ast.ClassDef):
        value = _assigned(found.node, "config_class")
        if isinstance(value, ast.Name):
            return _resolve(found.module, value.id)
        found = next(filter(None, map(find_definition, _bases(found))), None)
    return None


def _modeling(config: str) -> str:
    """The module with the models of a config class of transformers."""
    return config.rpartition(".")[0].replace(".configuration_", ".modeling_")


@cache
def config_class_of_type(model_type: str) -> str | None:
    """Return the dotted config class of a `model_type` of transformers, or None for one that it does not know."""
    pairs = _pairs("auto_mappings.py")
    name = next((name for kind, name in pairs if kind == model_type and name.endswith("Config")), None)
    folders = [name for kind, name in pairs if kind == model_type and re.fullmatch(r"[a-z0-9_]+", name)]
    for folder in (model_type.replace("-", "_"), *folders):
        module = f"transformers.models.{folder}.configuration_{folder}"
        if name is not None and name in _definitions(module):
            return f"{module}.{name}"
    return None


@cache
def rope_fields() -> tuple[str, ...]:
    """Names that `rope_parameters` of a transformers config may have."""
    return config_fields("transformers.modeling_rope_utils.RopeParameters") or ()


@cache
def _pairs(table: str) -> tuple[tuple[str, str], ...]:
    """(model_type, name) of every pair in one of transformers' tables of automatic classes."""
    root = package_folder("transformers")
    path = root / "models" / "auto" / table if root else None
    text = path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""
    return tuple(re.findall(r'\("([\w-]+)", "(\w+)"\)', text))


@cache
def _tree(module: str) -> ast.Module:
    """The module's source, or an empty one where there is none."""
    package, *names = module.split(".")
    root = package_folder(package) if package.isidentifier() else None
    if root is None:
        return ast.Module([], [])
    below = root.joinpath(*names)
    path = next((path for path in (below.with_suffix(".py"), below / "__init__.py") if path.is_file()), None)
    return ast.parse(path.read_text(encoding="utf-8")) if path is not None else ast.Module([], [])


@cache
def _definitions(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    return {node.name: node for node in _tree(module).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


@cache
def _imports(module: str) -> dict[str, str]:
    """Name -> dotted origin of what a module imports from others."""
    found: dict[str, str] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return found


def _resolve(module: str, name: str) -> str:
    """The dotted name of what a module calls `name`; names that transformers exports at its top are found by its tables."""
    if name in _definitions(module):
        return f"{module}.{name}"
    dotted = _imports(module).get(name, f"{module}.{name}")
    if Path(dotted.replace(".", "/")).parent.name == "transformers" and name.endswith("Config"):
        types = [kind for kind, config in _pairs("auto_mappings.py") if config == name]
        return next(filter(None, map(config_class_of_type, types)), dotted)
    return dotted


def _bases(found: Definition) -> list[str]:
    assert isinstance(found.node, ast.ClassDef)
    return [_resolve(found.module, base.id) for base in found.node.bases if isinstance(base, ast.Name)]


def _methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    return (child for child in node.body if isinstance(child, ast.FunctionDef))


def _arguments(function: ast.FunctionDef) -> list[str]:
    taken = function.args
    return [argument.arg for argument in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]


def _assigned(node: ast.ClassDef, name: str) -> ast.expr | None:
    """What a class assigns to `name` in its body."""
    for child in node.body:
        if isinstance(child, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in child.targets):
            return child.value
    return None


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Fields of one config class, bases left out."""
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name) and not _is_class_variable(child):
            if not child.target.id.startswith("_"):
                yield child.target.id
        elif isinstance(child, ast.FunctionDef) and child.name == "__init__":
            yield from _arguments(child)[1:]
    aliases = _assigned(node, "attribute_map")
    if isinstance(aliases, ast.Dict):
        yield from (str(key.value) for key in aliases.keys if isinstance(key, ast.Constant))
    for call in ast.walk(node):  # names of older checkpoints, which `__post_init__` takes out of its keyword arguments
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr in _READS
            and call.args
        ):
            holder, name = call.func.value, call.args[0]
            if isinstance(holder, ast.Name) and holder.id == "kwargs" and isinstance(name, ast.Constant):
                yield str(name.value)


def _is_class_variable(node: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.unparse(node.annotation)
