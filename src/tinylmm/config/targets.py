"""The allow-list of `_target_`: which dotted paths a spec may name, by the role they play. No torch.

A name is checked twice. `check_target` judges the text before anything is imported: the exact spelling of a class of a
part, or of a data builder, in a package that is allowed. `resolve_target` imports it later and judges what it found: an
allowed module that happens to import something else shall not lend it a second name (Hydra's GHSA-37p2-j732-x8pj).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tinylmm.errors import ConfigError, Fault, suggestion

Role = Literal["llm", "vision_tower", "encoder", "connector", "data", "benchmark", "backend"]
MAX_LENGTH = 200

_MODULES = r"(?:[a-z][a-z0-9_]*\.)+"
_CLASS = r"[A-Z][A-Za-z0-9]*"
_TRANSFORMERS = r"transformers\.(?:models\.[a-z][a-z0-9_]*\.modeling_[a-z0-9_]+\.)?"
_LLM = re.compile(
    rf"(?:{_TRANSFORMERS}(?!Auto){_CLASS}(?:ForCausalLM|LMHeadModel)|tinylmm\.models\.{_MODULES}{_CLASS})"
)
_ENCODER = re.compile(rf"(?:{_TRANSFORMERS}(?!Auto|PreTrained){_CLASS}Model|tinylmm\.models\.{_MODULES}{_CLASS})")
_TOWER = re.compile(rf"tinylmm\.models\.{_MODULES}{_CLASS}")
_CONNECTOR = re.compile(rf"(?:tinylmm\.models\.{_MODULES}{_CLASS}|torch\.nn\.(?:modules\.[a-z]+\.)?{_CLASS})")
_DATA = re.compile(rf"tinylmm\.data\.{_MODULES}(?:[a-z][a-z0-9_]*|{_CLASS})")
_BACKEND = re.compile(rf"tinylmm\.launch\.backends\.[a-z][a-z0-9_]*\.{_CLASS}")
_BENCHMARK = re.compile(rf"tinylmm\.evaluation\.benchmarks\.{_MODULES}{_CLASS}")
_TRUSTED_CLASS = re.compile(rf"{_MODULES}{_CLASS}")
_TRUSTED_ANY = re.compile(rf"{_MODULES}(?:[a-z][a-z0-9_]*|{_CLASS})")
_PACKAGE = re.compile(r"[a-z][a-z0-9_]*")

_FORMS: dict[Role, tuple[re.Pattern[str], str]] = {
    "llm": (
        _LLM,
        "a causal language model's class, such as transformers.PhiForCausalLM or tinylmm.models.<module>.<Class>",
    ),
    "vision_tower": (_TOWER, "a tower's class, tinylmm.models.<module>.<Class>"),
    "encoder": (
        _ENCODER,
        "an encoder's class, such as transformers.CLIPVisionModel or tinylmm.models.<module>.<Class>",
    ),
    "connector": (_CONNECTOR, "a connector's class, tinylmm.models.<module>.<Class> or torch.nn.<Class>"),
    "data": (_DATA, "a data builder, tinylmm.data.<module>.<function>"),
    "backend": (_BACKEND, "the name of a module in tinylmm.launch.backends"),
    "benchmark": (_BENCHMARK, "a benchmark's class, tinylmm.evaluation.benchmarks.<module>.<Class>"),
}
_PREFIXES: dict[Role, tuple[str, ...]] = {
    "llm": ("transformers.models.", "tinylmm.models."),
    "vision_tower": ("tinylmm.models.",),
    "encoder": ("transformers.models.", "tinylmm.models."),
    "connector": ("tinylmm.models.", "torch.nn.modules."),
    "data": ("tinylmm.data.",),
    "backend": ("tinylmm.launch.backends.",),
    "benchmark": ("tinylmm.evaluation.benchmarks.",),
}


def backend_target(name: str) -> str:
    """Return the dotted path of a launch backend's class; a shipped one goes by its module's name."""
    return name if "." in name else f"tinylmm.launch.backends.{name}.Backend"


def shipped_backends() -> list[str]:
    """Names of the launch backends that tinylmm has."""
    root = package_folder("tinylmm")
    found = (root / "launch" / "backends").glob("*.py") if root else ()
    return sorted(path.stem for path in found if path.stem != "__init__")


def check_trust(package: str) -> str | None:
    """Return what is wrong with one entry of `trust` (a plain top-level name outside the standard library), or None."""
    if not _PACKAGE.fullmatch(package):
        return f"is {package!r}; it must be the plain name of an installed package, in lower case and without dots"
    if package in sys.stdlib_module_names:
        return (
            f"is {package!r}, a module of Python itself, which holds no parts; name the package that has your classes"
        )
    return None


def check_target(dotted: str, trust: Sequence[str] = (), role: Role = "llm") -> str | None:
    """Return what is wrong with `dotted` as the target of `role`, or None. Imports nothing.

    Args:
        dotted: the text of a `_target_` (or of a tower's `encoder`).
        trust: packages that the user allows besides tinylmm, torch and transformers.
        role: which part is to be made.
    """
    pattern, form = _FORMS[role]
    shown = repr(dotted if len(dotted) <= MAX_LENGTH else dotted[:MAX_LENGTH] + "...")
    first = dotted.split(".", 1)[0]
    if len(dotted) <= MAX_LENGTH and pattern.fullmatch(dotted):
        return _absent(dotted, shown)
    trusted = _TRUSTED_ANY if role == "data" else _TRUSTED_CLASS
    if first in trust and check_trust(first) is None and len(dotted) <= MAX_LENGTH and trusted.fullmatch(dotted):
        return None
    if first in ("tinylmm", "torch", "transformers"):
        names = _names_of_transformers() if first == "transformers" else frozenset()
        fitting = sorted(name for name in names if pattern.fullmatch(f"transformers.{name}"))
        return f"is {shown}; it must be {form}. {suggestion(dotted.rpartition('.')[2], fitting)}".rstrip(". ")
    return f"is {shown}, which is not allowed; it must be {form}, or a class of a package that `trust` names"


def resolve_target(dotted: str, trust: Sequence[str] = (), base: type | None = None, role: Role = "llm") -> Any:
    """Import what `dotted` names, and check what it is: a class (a function or class for data) defined where it may be.

    Args:
        dotted: a target that `check_target` accepts.
        trust: packages that the user allows.
        base: class that the result must be derived from (`torch.nn.Module` for parts).
        role: which part is to be made.

    Returns:
        The class, or the function of a data builder.

    Raises:
        ConfigError: the name is refused, does not exist, or stands for something defined elsewhere.
    """
    wrong = check_target(dotted, trust, role)
    if wrong is not None:
        raise ConfigError([Fault("_target_", wrong)])
    module_name, _, name = dotted.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            [Fault("_target_", f"is {dotted!r}, but {error}", "Install it or correct the name.")]
        ) from error
    found = getattr(module, name, None)
    if found is None:
        hint = suggestion(name, [n for n in dir(module) if not n.startswith("_")])
        raise ConfigError([Fault("_target_", f"is {dotted!r}, but {module_name} has no {name!r}.", hint)])
    home = str(getattr(found, "__module__", ""))
    allowed = (*_PREFIXES[role], *(f"{package}." for package in trust if check_trust(package) is None))
    if not f"{home}.".startswith(allowed):
        raise ConfigError([Fault("_target_", f"is {dotted!r}, which is really {home}.{name} and not allowed")])
    if not (inspect.isclass(found) or (role == "data" and inspect.isfunction(found))):
        raise ConfigError([Fault("_target_", f"is {dotted!r}, which is a {type(found).__name__}, not a class")])
    if base is not None and not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(
            [Fault("_target_", f"is {dotted!r}, which is not derived from {base.__module__}.{base.__name__}")]
        )
    return found


def _absent(dotted: str, shown: str) -> str | None:
    """What is wrong when an allowed spelling names nothing, as far as the source text can tell without an import."""
    module, _, name = dotted.rpartition(".")
    if module.startswith("tinylmm."):
        names = _names_of_module(module)
        if names is None:
            return f"is {shown}, but tinylmm has no module {module!r}"
    elif dotted.startswith("transformers."):
        names = _names_of_transformers()
    else:
        return None
    if name in names:
        return None
    return f"is {shown}, but there is no {name!r}. {suggestion(name, names)}".rstrip()


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed top-level package without importing it, or None if there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


@cache
def _names_of_module(module: str) -> frozenset[str] | None:
    """Classes and functions that a module of tinylmm defines, read from its source."""
    root = package_folder("tinylmm")
    path = root.joinpath(*module.split(".")[1:]).with_suffix(".py") if root else None
    if path is None or not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(_definitions(tree.body))


def _definitions(body: Iterable[ast.stmt]) -> Iterable[str]:
    return (
        node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    )


@cache
def _names_of_transformers() -> frozenset[str]:
    """Every model class that transformers' own tables of automatic classes name."""
    root = package_folder("transformers")
    path = root / "models" / "auto" / "modeling_auto.py" if root else None
    if path is None or not path.is_file():
        raise ConfigError([Fault("transformers", "is not installed, or is not the version that tinylmm needs")])
    return frozenset(re.findall(rf'"({_CLASS})"', path.read_text(encoding="utf-8")))
