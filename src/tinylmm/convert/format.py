"""What a foreign checkpoint format is, and the table of all: the modules of `convert/formats` and those of other packages.

A format is one module with a `FORMAT`. It is in the table because it lies in `convert/formats`, or because an installed
package names it: `[project.entry-points."tinylmm.formats"]`, `NAME = "package.module"`. Nothing here loads torch.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinylmm.convert import formats
from tinylmm.convert.asking import Program
from tinylmm.errors import UserError

if TYPE_CHECKING:
    import torch

    from tinylmm.convert.parts import Parts
    from tinylmm.convert.source import Source
    from tinylmm.models.checkpoint import LoadedModel

GROUP = "tinylmm.formats"
"""Entry points under which other packages name their format modules."""


@dataclass
class Export:
    """What a writer is given, and adds its notes to.

    Attributes:
        loaded: the model, in evaluation mode on the CPU, in fp32 but with weights that `dtype` holds exactly.
        dtype: of the written weights.
        llm, tower: what the other tool shall load tokenizer and image processor from, if it loads them by name.
        notes: what the user should know about the result, one sentence each.
        quantization: how the LLM's matrices are quantised in the file, one of the format's `quantizations`.
    """

    loaded: LoadedModel
    dtype: torch.dtype
    llm: str | None = None
    tower: str | None = None
    notes: list[str] = field(default_factory=list)
    quantization: str | None = None


@dataclass(frozen=True)
class Written:
    """What a writer did.

    Attributes:
        tensors: how many it wrote.
        difference: largest absolute difference of logits between our model and the folder as the other tool loads it; None
            where nothing here can load it.
    """

    tensors: int
    difference: float | None = None


@dataclass(frozen=True)
class Usage:
    """How one program loads a written folder.

    Attributes:
        program: its name.
        code: what to type; FOLDER stands for the folder, NAME for its name.
        language: of the code.
        remark: what holds there; one sentence, or empty.
    """

    program: str
    code: str
    language: str = "bash"
    remark: str = ""


@dataclass(frozen=True)
class Outlet:
    """What a model card says of a written folder besides where its model comes from.

    Attributes:
        library: the hub's word for what loads it first.
        tags: the hub's words.
        usage: how programs load it.
        limits: one sentence each.
    """

    library: str | None
    tags: Sequence[str]
    usage: Sequence[Usage]
    limits: Sequence[str] = ()


@dataclass(frozen=True)
class Format:
    """The checkpoints of one tool, of one layout or of several.

    `readers` and `writers` are written as dict displays in the call: the command line reads their keys from the module's
    source text, without importing it.

    Attributes:
        holds: what a written model is, in the sentence "this model cannot be ...".
        readers: name for `tinylmm import --layout` -> reads a checkpoint into parts.
        detect: says which of `readers` a folder is for, from file names and config.json alone; None: it is none of them.
        writers: name for `tinylmm export --to` -> writes into a new, empty folder.
        obstacles: every reason why a model cannot be written, with what to do about it.
            quantizations: what `tinylmm export --dtype` may say besides torch's dtypes.
        programs: writer's name -> who `tinylmm export --verify` asks about what it wrote.
        outlets: writer's name -> what the model card says of what it wrote.
        keeps_adapters: adapters of the model are handed to the writer beside their bases; else they are merged before.
    """

    holds: str
    readers: Mapping[str, Callable[[Source], Parts]] = field(default_factory=dict)
    detect: Callable[[Source], str | None] = lambda source: None
    writers: Mapping[str, Callable[[Export, Path], Written]] = field(default_factory=dict)
    obstacles: Callable[[Export], list[str]] = lambda export: []
    quantizations: Sequence[str] = ()
    programs: Mapping[str, Program] = field(default_factory=dict)
    outlets: Mapping[str, Outlet] = field(default_factory=dict)
    keeps_adapters: bool = False


def find_names(kind: Literal["readers", "writers"]) -> list[str]:
    """Return the names of all readers or writers, without importing the modules that have them."""
    found: list[str] = []
    for module in _modules():
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise UserError(f"the checkpoint format '{module}' is announced by a package, but there is no such module.")
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FORMAT":
                found += _keys(node.value, kind)
    return found


def all_formats() -> list[Format]:
    """Import every format.

    Raises:
        UserError: two of them share a name.
    """
    found: list[Format] = [importlib.import_module(module).FORMAT for module in _modules()]
    for names in ([n for f in found for n in f.readers], [n for f in found for n in f.writers]):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two checkpoint formats are called {', '.join(twice)}; uninstall one of their packages.")
    return found


def detect_layout(source: Source) -> str:
    """Tell the layout from file names and config.json alone; the names are those of `--layout`.

    Raises:
        UserError: it is none that is known, several, or our own.
    """
    if source.model_type == "tinylmm":
        raise UserError(f"{source.folder} is a tinylmm model already; it needs no import.")
    found = [layout for known in all_formats() if (layout := known.detect(source)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{source.folder} could be of the layouts {', '.join(found)}. Name the right one with --layout."
        )
    raise UserError(
        f"{source.folder} is of no layout that can be imported (model_type '{source.model_type}', architectures "
        f"{source.architectures}). Name the layout with --layout if you know it."
    )


def _modules() -> list[str]:
    ours = [module.name for module in pkgutil.iter_modules(formats.__path__, f"{formats.__name__}.")]
    return ours + sorted(entry.value for entry in entry_points(group=GROUP))


def _keys(call: ast.expr, keyword: str) -> list[str]:
    if not isinstance(call, ast.Call):
        return []
    displays = [k.value for k in call.keywords if k.arg == keyword and isinstance(k.value, ast.Dict)]
    return [str(ast.literal_eval(key)) for display in displays for key in display.keys if key is not None]
