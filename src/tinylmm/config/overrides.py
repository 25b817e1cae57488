"""The words of the command line: aliases, checks and suggestions, before Hydra composes anything. No torch.

Hydra stops at the first word that it does not understand, and refuses an unknown nested key without a suggestion. Here
every word is judged, the good ones go on, and plain keys become `++key=value`, so that the spec's own check reports
wrong keys together with everything else.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from tinylmm.config.groups import EXPERIMENTS
from tinylmm.errors import Fault, suggestion

ALIASES = {"vt": "vision_tower", "experiment": "experiments"}
HYDRA_KEYS = ("hydra.sweeper.params.", "hydra.mode")
"""Of Hydra's own settings, those that a command line or an experiment may set: the rest could name code to be run."""

_ALIAS = re.compile(rf"(?P<sign>[~+]{{0,2}})(?P<alias>{'|'.join(ALIASES)})(?=[=.@]|$)")
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w]*(\.[\w-]+)*", re.ASCII)
_SECRET_KEY = re.compile(
    r"(^|[_.\-])(api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|secret|secrets|password|passwd|passphrase|credentials?|bearer)($|[_.\-=])"
    r"|(^|[_.\-])(hub|hf|auth|access|api|refresh|session|wandb|github|bot|user)[_-]?token($|[_.\-=])"
    r"|^(token|auth|authorization|key)($|[.=])|\.(token|auth|authorization)($|[.=])",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_\-]{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{12,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bxox[abprs]-[A-Za-z0-9\-]{8,}|\bwandb_v1_\w{8,}|-----BEGIN [A-Z ]*PRIVATE KEY|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_USE_ENVIRONMENT = (
    "Secrets come from the environment only (WANDB_API_KEY, HF_TOKEN): remove it here and set the variable."
)


@dataclass(frozen=True)
class Words:
    """Judged words: what Hydra may compose, and what is wrong with the others."""

    good: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Vocabulary:
    """What words may say.

    Attributes:
        groups: config group -> its choices.
        defaults: groups that always have a choice (the defaults list of train.yaml).
        keys: top-level keys of the run spec.
        nested: (last segment, dotted path) of every key below them, for suggestions.
    """

    groups: Mapping[str, Sequence[str]]
    defaults: Sequence[str]
    keys: Sequence[str]
    nested: Sequence[tuple[str, str]] = ()


def looks_secret(key: str) -> bool:
    """Whether a key is named like something that must not be written down."""
    return bool(_SECRET_KEY.search(key))


def holds_secret(text: str) -> bool:
    """Whether a text holds something in the form of a known kind of secret, or reads one from the environment."""
    names = re.findall(r"oc\.env:\s*['\"]?(\w+)", text)
    return bool(_SECRET_VALUE.search(text)) or any(looks_secret(name) for name in names)


def redacted(text: str) -> str:
    """Return `text` without what is in the form of a known kind of secret."""
    return _SECRET_VALUE.sub("(hidden)", text)


def secret_fault(where: str) -> Fault:
    """Return the fault for a secret in the configuration; it shows no value."""
    return Fault(redacted(where), "looks like a secret, and a spec is written to disk.", _USE_ENVIRONMENT)


def expand_alias(word: str) -> str:
    """Return the word with an alias (`vt`) written out: `vt=clip`, `~vt`, `+vt=x`, `vt.select_layer=-1`."""
    return (
        _ALIAS.sub(lambda match: match["sign"] + ALIASES[match["alias"]], word, count=1) if _ALIAS.match(word) else word
    )


def check_words(words: Iterable[str], vocabulary: Vocabulary, loader: ConfigLoader | None = None) -> Words:
    """Judge every word; none stops the others.

    Args:
        words: command-line overrides as given.
        vocabulary: groups with their choices, and the spec's keys.
        loader: Hydra's config loader, needed to enumerate `glob(*)` sweeps.
    """
    parser = OverridesParser.create(config_loader=loader)
    good: list[str] = []
    faults: list[Fault] = []
    for given in words:
        word = expand_alias(given)
        key, _, value = word.partition("=")
        bare = key.lstrip("~+-")
        if looks_secret(bare) or holds_secret(value) or holds_secret(bare):
            faults.append(secret_fault(bare))
            continue
        if not bare:
            faults.append(_malformed(given, vocabulary))
            continue
        try:
            override = parser.parse_overrides([word])[0]
        except HydraException:
            quoted_word = _quoted(word, parser, vocabulary)
            faults.append(_malformed(given, vocabulary, quoted_word))
            # the value is known all the same, so nobody needs to be told that it is missing
            good += [] if quoted_word is None else [f"++{quoted_word}"]
            continue
        if override.key_or_group == EXPERIMENTS and not override.is_delete():
            word = _with_folder(word, vocabulary)
            override = parser.parse_overrides([word])[0]
        found = _judge(override, vocabulary)
        faults += found
        if not found:
            good.append(_for_hydra(override, word, vocabulary))
    return Words(tuple(good), tuple(faults))


def is_sweep(word: str, loader: ConfigLoader | None = None) -> bool:
    """Whether a well-formed word has several values (`a=1,2`, `range`, `glob`)."""
    return bool(OverridesParser.create(config_loader=loader).parse_overrides([word])[0].is_sweep_override())


def _with_folder(word: str, vocabulary: Vocabulary) -> str:
    """`experiments=name` with `name/name` written out, for experiments that have a folder of their own."""
    key, _, values = word.partition("=")
    choices = vocabulary.groups.get(EXPERIMENTS, ())
    names = [
        f"{name}/{name}" if name not in choices and f"{name}/{name}" in choices else name for name in values.split(",")
    ]
    return f"{key}={','.join(names)}"


def _judge(override: Override, vocabulary: Vocabulary) -> list[Fault]:
    key = override.key_or_group
    first = re.split(r"[./]", key, maxsplit=1)[0]
    if first == "hydra":
        if key.startswith(HYDRA_KEYS) and "/" not in key:
            return []
        what = "is a setting of Hydra that cannot be changed here."
        return [Fault(key, what, "Of Hydra's own, hydra.mode and hydra.sweeper.params.* may be set.")]
    if override.value_type is not None and override.is_sweep_override() and not override.is_discrete_sweep():
        return [
            Fault(key, "is an interval, which has no end of values.", "Use a list a,b,c or range(start,stop,step).")
        ]
    if key in vocabulary.groups:
        return [] if override.is_delete() else _judge_choices(override, key, vocabulary.groups[key])
    if first in vocabulary.keys and "/" not in key and override.package is None:
        return []
    return [_unknown(key, first, override, vocabulary)]


def _judge_choices(override: Override, group: str, choices: Sequence[str]) -> list[Fault]:
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    faults: list[Fault] = []
    for value in values:
        named = value if isinstance(value, list) else [value]
        if isinstance(value, list) and group != "eval":
            faults.append(
                Fault(group, f"is a list, but one choice is taken: {', '.join(choices)}.", f"To sweep: {group}=a,b -m")
            )
            continue
        if len(named) > 1 and {"auto", "none"} & {str(name) for name in named}:
            faults.append(Fault(group, "auto and none stand alone, not in a list.", f"Choices: {', '.join(choices)}."))
            continue
        faults += [choice_fault(group, name, choices) for name in named if _text(name) not in choices]
    return faults


def choice_fault(group: str, name: Any, choices: Sequence[str]) -> Fault:
    """Return the fault for a choice that a group does not have."""
    shown = "null" if name is None else redacted(_text(name))
    if group == EXPERIMENTS:  # a study in a folder of its own is named by that
        choices = [path.name if path.parent.name == path.name else str(path) for path in map(PurePosixPath, choices)]
    hint = suggestion(shown.lower(), choices)
    what = f"'{shown}' is not a choice of {group}; choices: {', '.join(choices) or '(none)'}."
    if group == EXPERIMENTS and not choices:
        hint = "It is looked for in the folder experiments/ of the current folder."
    return Fault(group, what, hint)


def _text(value: Any) -> str:
    """A choice as text: Hydra reads `true` and `7` as a bool and a number, and text in quotes as a quoted string."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "text", value))


def _unknown(key: str, first: str, override: Override, vocabulary: Vocabulary) -> Fault:
    names = [*vocabulary.groups, *vocabulary.keys]
    value = None if override.is_delete() or override.is_sweep_override() else override.value()
    owners = [group for group, choices in vocabulary.groups.items() if isinstance(value, str) and value in choices]
    rest = key.partition(".")[2]
    paths = {path for _, path in vocabulary.nested}
    holders = [name for name in vocabulary.keys if rest and f"{name}.{rest}" in paths]
    nested = [path for leaf, path in vocabulary.nested if leaf == key.rsplit(".", 1)[-1]]
    nested.sort(key=lambda path: not path.startswith("recipe."))  # what people mean most often
    if len(owners) == 1 and "." not in key:
        hint = f"Did you mean '{owners[0]}'?"
    elif len(holders) == 1:
        hint = f"Did you mean '{holders[0]}.{rest}'?"
    elif nested and not suggestion(first.lower(), [n for n in names if n[:1] == first[:1].lower()]):
        hint = f"Did you mean {' or '.join(repr(path) for path in dict.fromkeys(nested[:3]))}?"
    else:
        hint = suggestion(first.lower(), [*names, *ALIASES])
    keys = [name for name in vocabulary.keys if name not in vocabulary.groups]
    fix = hint or f"Groups: {', '.join(vocabulary.groups)}. Keys: {', '.join(keys)}."
    return Fault(redacted(key), f"unknown key '{redacted(first)}'.", fix)


def quoted(text: str) -> str:
    """Return a text as Hydra reads it back from a word's value, whatever is in it."""
    mark = "'" if '"' in text and "'" not in text else '"'
    escaped = re.sub(rf"(\\*)({mark}|$)", lambda found: found[1] * 2 + ("\\" + mark if found[2] else ""), text)
    return f"{mark}{escaped}{mark}"


def _quoted(word: str, parser: OverridesParser, vocabulary: Vocabulary) -> str | None:
    """`key=value` with its value in quotes, or None where that is not what keeps it from being read."""
    key, equals, value = word.partition("=")
    if not equals or not value or value[0] in "\"'[{" or not _PLAIN_KEY.fullmatch(key):
        return None
    candidate = f"{key}={quoted(value)}"
    try:
        (override,) = parser.parse_overrides([candidate])
    except HydraException:
        return None
    return None if _judge(override, vocabulary) else candidate


def _malformed(word: str, vocabulary: Vocabulary, quoted_word: str | None = None) -> Fault:
    bare = word.strip()
    shown = redacted(repr(word))
    for group, choices in vocabulary.groups.items():
        if bare in choices:
            return Fault(shown, "is a choice without its group.", f"Did you mean '{group}={bare}'?")
    if bare in vocabulary.groups:
        return Fault(shown, "has no choice.", f"Write {bare}=<one of {', '.join(vocabulary.groups[bare])}>.")
    if "=" not in bare:
        return Fault(shown, "is no override.", "Write key=value or group=choice (~key removes one).")
    if bare.startswith("-"):
        return Fault(shown, "is no option of this command.", f"A setting has no dashes: {bare.lstrip('-')}")
    if quoted_word is not None:
        return Fault(shown, "cannot be read: its value needs quotes.", f"Write {redacted(shlex.quote(quoted_word))}")
    fix = "Write key=value without spaces around '='; put a value with special characters in quotes: 'key=\"a, b\"'."
    return Fault(shown, "cannot be read.", fix)


def _for_hydra(override: Override, word: str, vocabulary: Vocabulary) -> str:
    """The word as Hydra shall see it: a group chosen or added as the defaults need, a plain key always accepted."""
    key = override.key_or_group
    if override.is_delete() or key.startswith("hydra."):
        return word
    bare = word.lstrip("+")
    if key in vocabulary.groups:
        known = key in vocabulary.defaults or override.package is not None
        return bare if known else f"+{bare}"
    return f"++{bare}"
