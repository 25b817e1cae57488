"""What is frozen, as it is now. `write.py` writes it to the JSON files beside this, the tests compare it with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.frozen import product
from tests.frozen.combinations import COMBINATIONS, MODEL, NEVER_VARY, SPECIMENS
from tests.frozen.small_models import SMALL_MODELS

FOLDER = Path(__file__).parent
PARTS = ("llm", "vision_tower", "connector")
WEIGHTS = "model.safetensors"
FILL = 0.25
VERSIONS = ("transformers_version", "tinylmm_version", "peft_version")
OPAQUE = {"architecture", "options", "trainer", "text_tower", "content", "lr", "mixture", "sampling"}
"""Fields of an identity whose keys are not the spec's own."""


@cache
def frozen(name: str) -> Any:
    """The content of one of the JSON files."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- digests


def write_model() -> None:
    """Write ./model, a model's folder as far as it is read without torch."""
    folder = Path("model")
    for name, content in frozen_model().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def frozen_model() -> dict[str, Any]:
    """Files of a model of TinyLlama and CLIP in small, as the product wrote them when this was frozen."""
    llm = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "dtype": "float32"}
    tower = {"model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 3, "image_size": 16}
    image = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "mode": "squash", "resample": "bicubic"}
    config = {
        "model_type": "tinylmm",
        "format": 1,
        "llm": {"_target_": "transformers.LlamaForCausalLM"},
        "vision_tower": {
            "_target_": "tinylmm.models.vision.HFVisionTower",
            "encoder": "transformers.CLIPVisionModel",
            "select_layer": -2,
            "select": "patch",
            "drop_first_token": False,
            "options": {},
        },
        "connector": {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {"depth": 2}},
        "image": image,
        "template": "llama",
    }
    return {"config.json": config, "llm/config.json": llm, "vision_tower/config.json": tower, "tokenizer/a.json": {}}


def composed(words: list[str]) -> list[product.Stage]:
    """The stages of a combination; to be called in an empty folder."""
    if any(word.startswith("recipe.from_model=") for word in words):
        write_model()
    return product.stages(words)


def digest_lines(stages: Iterable[product.Stage]) -> list[str]:
    """One line a stage, in the graph's order."""
    return [f"{stage.kind:7} {stage.name:32} {stage.digest}" for stage in stages]


def identity(stage: product.Stage, stages: Iterable[product.Stage]) -> dict[str, Any]:
    """What a stage's digest is made of; parents by their names, as their digests are frozen elsewhere."""
    names = {other.digest: other.name for other in stages}
    parents = {role: names[digest] for role, digest in sorted(stage.parents.items())}
    return {"kind": stage.kind, "spec": stage.spec, "parents": parents}


def digests() -> dict[str, list[str]]:
    """Combination -> its stages.

    Raises:
        ValueError: a field of an identity has the same value in all combinations.
    """
    found = {name: composed(words) for name, words in COMBINATIONS.items()}
    seen: dict[tuple[str, str], set[str]] = {}
    for stages in found.values():
        for stage in stages:
            for field, value in _fields(stage.spec):
                seen.setdefault((stage.kind, field), set()).add(json.dumps(value, sort_keys=True))
    constant = {field for field, values in seen.items() if len(values) == 1} - NEVER_VARY
    if constant:
        raise ValueError(f"these fields have one value in all combinations: {sorted(constant)}")
    return {name: digest_lines(stages) for name, stages in found.items()}


def _fields(spec: dict[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in spec.items():
        if isinstance(value, dict) and key not in OPAQUE:
            yield from _fields(value, f"{path}{key}.")
        else:
            yield path + key, value


def specs() -> dict[str, dict[str, Any]]:
    """Combination -> stage -> identity, for the specimens."""
    found: dict[str, dict[str, Any]] = {}
    for name, wanted in SPECIMENS.items():
        stages = composed(COMBINATIONS[name])
        by_name = {stage.name: stage for stage in stages}
        found[name] = {stage: identity(by_name[stage], stages) for stage in wanted}
    return found


# -------------------------------------------------------------------------------------------------- models


def targets() -> dict[str, list[str]]:
    """Role -> dotted paths that the shipped YAMLs name: they are in the digests and in saved models."""
    found: dict[str, set[str]] = {}
    for path in sorted((FOLDER.parents[1] / "conf").glob("*/*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        group = path.parent.name
        if "_target_" in content:
            found.setdefault(group, set()).add(content["_target_"])
        if "encoder" in content:
            found.setdefault("encoder", set()).add(content["encoder"])
        if group == "data" and "build" in content:
            found.setdefault("data", set()).add(content["build"]["_target_"])
    return {role: sorted(paths) for role, paths in sorted(found.items())}


def tree(folder: Path) -> list[str]:
    """Paths of all files in `folder`."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def without_versions(value: Any) -> Any:
    """The value without the versions of the libraries that wrote it."""
    if isinstance(value, dict):
        return {key: without_versions(item) for key, item in value.items() if key not in VERSIONS}
    return [without_versions(item) for item in value] if isinstance(value, list) else value


def configs(folder: Path) -> dict[str, Any]:
    """Every config.json of a model's folder, and what else describes its parts."""
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json", "part.json")
    paths = [name for name in tree(folder) if name.rsplit("/")[-1] in names]
    return {name: without_versions(json.loads((folder / name).read_text(encoding="utf-8"))) for name in paths}


def tiny_model(folder: Path) -> dict[str, Any]:
    """The tests' tiny model as it is saved: files, configs, and the very text of its config.json but for the version."""
    product.save_tiny(folder / "model")
    text = (folder / "model/config.json").read_text(encoding="utf-8")
    text = re.sub(r'("tinylmm_version": )"[^"]+"', r'\1"VERSION"', text)
    return {"tree": tree(folder / "model"), "text": text.split("\n"), "configs": configs(folder / "model")}


def small_model(name: str, folder: Path) -> dict[str, Any]:
    """One of SMALL_MODELS as it is saved: its configs, and the names and shapes of its tensors."""
    from safetensors import safe_open

    product.save_small(SMALL_MODELS[name], folder / "model")
    tensors: dict[str, dict[str, str]] = {}
    for part in PARTS:
        with safe_open(folder / "model" / part / WEIGHTS, "pt") as file:
            tensors[part] = {key: " ".join(map(str, file.get_slice(key).get_shape())) for key in sorted(file.keys())}
    described = {key: value for key, value in configs(folder / "model").items() if not key.startswith("tokenizer")}
    return {"configs": described, "tensors": tensors}


def small_models(folder: Path) -> dict[str, Any]:
    """All of SMALL_MODELS."""
    return {name: small_model(name, folder / name) for name in SMALL_MODELS}


def write_small_model(name: str, folder: Path) -> None:
    """Write the folder of a small model from what is frozen of it: no class is asked how. Every weight is FILL."""
    import torch
    from safetensors.torch import save_file

    saved = frozen("small_models")[name]
    for path, content in saved["configs"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    for part, shapes in saved["tensors"].items():
        (folder / part).mkdir(exist_ok=True)
        weights = {key: torch.full([int(n) for n in shape.split()], FILL) for key, shape in shapes.items()}
        save_file(weights, folder / part / WEIGHTS, {"format": "pt"})
    product.save_tokenizer(folder / "tokenizer")


# --------------------------------------------------------------------------------------------------- store

TOY_DATA = {"pretrain": 64, "share": 8, "finetune": 16, "text": 64, "test": 4}
DATA_SETS = ("data", "llm.build.data", "vision_tower.build.data", "eval.digits.data")
RUN = (
    *(f"{data}.build.options.{name}={count}" for data in DATA_SETS for name, count in TOY_DATA.items()),
    *("recipe=lora", "llm.build.steps=2", "vision_tower.build.steps=2", "vision_tower.build.batch=16"),
    *("tracking.log_steps=1", "name=frozen", "recipe.stages.finetune.epochs=1", "launch.device=cpu"),
)
MAY_BE_ABSENT = {"git"}
MAY_BE_NULL = {"boot_id", "pid_namespace", "parsed"}
ADAPTER = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "target_modules")
"""Of peft's own file, what tinylmm sets: the rest grows from version to version."""


def shape(value: Any) -> Any:
    """The value's form: keys, and types in place of what changes from run to run; a list's distinct forms."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in MAY_BE_ABSENT}
        return {key: "str or null" if key in MAY_BE_NULL else shape(item) for key, item in kept.items()}
    if isinstance(value, list):
        forms: list[Any] = []
        for item in map(shape, value):
            if item not in forms:
                forms.append(item)
        return forms
    return "number" if isinstance(value, float) or type(value) is int else type(value).__name__


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[Any]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def store_layout(root: Path) -> dict[str, Any]:
    """A finished toy run's store: names of all files, and the form of every record."""
    project = product.Project(root, RUN)
    product.train(project)
    return described_store(project.store)


def described_store(store: Path) -> dict[str, Any]:
    """A store with one run, `frozen`; digests are replaced by the names of stages."""
    run = read(store / "runs/frozen/run.json")
    names = {stage["key"]: f"{stage['kind']}-({stage['name'].replace('/', ' ')})" for stage in run["stages"]}
    found: dict[str, Any] = {"tree": _tidy(tree(store), names), "keys": [stage["key"] for stage in run["stages"]]}
    found["run.json"] = shape({key: value for key, value in run.items() if key != "spec"})
    found["run.json: spec"] = without_versions(run["spec"]) | {"store": None}
    found["results.json"] = shape(read(store / "reports/frozen/results.json"))
    for key, name in names.items():
        folder = store / "stages" / key
        manifest, spec = read(folder / "manifest.json"), read(folder / "spec.json")
        output = folder / "output"
        found[name] = {
            "spec.json": {k: list(v) if k == "settings" else shape(v) if k != "spec" else "" for k, v in spec.items()},
            "manifest.json": shape({k: v for k, v in manifest.items() if k != "files"}),
            "a file in manifest.json": shape(manifest["files"]["spec.json"]),
            "metrics.jsonl": shape(rows(folder / "metrics.jsonl")),
            "COMPLETE": shape((folder / "COMPLETE").read_text(encoding="utf-8")),
        }
        for path in sorted([*output.glob("*.json"), *output.glob("*.jsonl"), *output.glob("samples/*info.json")]):
            if path.name in ("part.json", "scores.json", "report.json"):
                found[name][path.name] = shape(read(path))
            if path.name == "generations.jsonl":
                found[name][path.name] = shape(rows(path))
        for path in output.rglob("adapter_config.json"):
            found[name][path.name] = {key: read(path)[key] for key in ADAPTER}
            found[name]["adapters in config.json"] = read(output / "model/config.json")["adapters"]
    return found


def _tidy(paths: list[str], names: dict[str, str]) -> list[str]:
    """Paths with names for digests; numbered images of one folder, and what a date or a host names, once."""
    found = set()
    for path in paths:
        for key, name in names.items():
            path = path.replace(key, name)
        path = re.sub(r"\b[0-9a-f]{32}\b", "(digest)", path)
        path = re.sub(r"/[0-9]{6}\.png$", "/(number).png", path)
        found.add(re.sub(r"tfevents\..*", "tfevents.(...)", path))
    return sorted(found)


def failed_stage(root: Path) -> dict[str, Any]:
    """What is left in the store of a stage that failed, with its job.json."""
    project = product.tiny_project(root)
    (root / "data/pretrain.json").write_text("[{}]", encoding="utf-8")
    product.failing(product.Project(root, (*project.words, "name=frozen")))
    run = read(project.store / "runs/frozen/run.json")
    names = {stage["key"]: f"{stage['kind']}-({stage['name']})" for stage in run["stages"]}
    (work,) = (project.store / "work").iterdir()
    job = json.dumps(read(work / "job.json"))
    for text, name in ((str(root.resolve()), "ROOT"), (str(root), "ROOT"), *names.items()):
        job = job.replace(text, name)
    record = json.loads(job)
    record["digest"] = record["claim"] = None
    for part in ("source", "tokenizer"):
        record["spec"][part]["content"] = None
    return {"tree": _tidy(tree(project.store), names), "run.json": shape(run["stages"]), "job.json": record}


# ----------------------------------------------------------------------------------------------- JSON output


def plans(folder: Path) -> dict[str, Any]:
    """What `tinylmm plan --json` prints of runs that have done nothing yet, without `estimate`, which goes by the machine."""
    wanted = {
        "default": ["store=store"],
        "files are missing": ["llm=phi2", "vt=siglip", "recipe=share", "eval=pope", "data.root=data", "store=store"],
        "a sweep": ["-m", "seed=1,2", "store=store"],
        "unknown numbers": ["llm=hf", "llm.pretrained=org/llm", "vt=siglip", "data=digits", "eval=none", "store=store"],
    }
    found = {}
    for name, words in wanted.items():
        plan = product.printed_plan(folder, words)
        del plan["estimate"]
        text = json.dumps(plan)
        for path in (str(folder.resolve()), str(folder)):
            text = text.replace(path, "HERE")
        found[name] = json.loads(text)
    return found


def results(folder: Path) -> dict[str, Any]:
    """The results.json of a made-up store, numbers to nine digits."""
    builder = product.StoreBuilder(folder / "store")
    builder.whole("made-up")
    found: dict[str, Any] = rounded(product.report_of(builder.root))
    return found


def rounded(value: Any) -> Any:
    """The value with numbers to nine digits: the last ones may be a processor's own."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------- real files


def contents(folder: Path) -> dict[str, Any]:
    """What identifies files of people: annotations in each layout, benchmarks, models and checkpoints, by content."""
    root = folder / "data"
    (root / "images").mkdir(parents=True)
    for number in range(3):
        (root / f"images/{number}.png").write_bytes(b"not opened" * (number + 1))
    (root / "llava.json").write_text(json.dumps([_llava(number) for number in range(3)]), encoding="utf-8")
    lines = "".join(json.dumps(_openai(number)) + "\n" for number in range(2))
    (root / "openai.jsonl").write_text(lines, encoding="utf-8")
    words = ["llm=phi2", "vt=siglip", "eval=none", f"data.root={root}", "store=store"]
    llava = ["data.sources.{}.annotations=llava.json", "data.sources.{}.images=images"]
    pretrain = [word.format("pretrain") for word in llava]
    finetune = [word.format("finetune") for word in llava]
    openai = [finetune[0].replace("llava.json", "openai.jsonl"), finetune[1], "data.sources.finetune.format=openai"]
    write_model()
    found = {
        "llava": _content(words + pretrain + finetune, "prepare[finetune]"),
        "llava, limited": _content(
            [*words, *pretrain, *finetune, "data.sources.finetune.limit=1"], "prepare[finetune]"
        ),
        "openai": _content([*words, *pretrain, *openai], "prepare[finetune]"),
        "missing": _content(words, "prepare[finetune]"),
        "model": _content(["recipe=custom_finetune", MODEL, "data=digits", "eval=none", "store=store"], "finetune"),
        "tokenizer": _content(
            [*words, *pretrain, *finetune, "llm.tokenizer.pretrained=model/llm"], "prepare[finetune]"
        ),
    }
    folders = {
        "gqa": product.qa_folders.gqa_folder,
        "pope": product.qa_folders.pope_folder,
        "textvqa": product.qa_folders.textvqa_folder,
        "mme": product.qa_folders.mme_folder,
    }
    for name, write in folders.items():
        write(folder / name)
        benchmark = [*words, *pretrain, *finetune, f"eval={name}", f"eval.{name}.root={folder / name}"]
        found[name] = _content(benchmark, f"{name}@finetune")
    return found


def _content(words: list[str], name: str) -> dict[str, Any]:
    """What a stage's identity says of files outside the store."""
    spec = next(stage.spec for stage in product.planned(words) if stage.name == name)
    return {key: spec[key] for key in ("source", "model", "content", "tokenizer") if key in spec}


def _llava(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": str(number)}]
    return {"id": str(number), "image": f"{number}.png", "conversations": turns}


def _openai(number: int) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": f"{number}.png"}}
    asked = {"role": "user", "content": [image, {"type": "text", "text": "What?"}]}
    return {"id": str(number), "messages": [asked, {"role": "assistant", "content": str(number)}]}


RECORDS: dict[str, Callable[[Path], Any]] = {
    "digests": lambda folder: digests(),
    "specs": lambda folder: specs(),
    "targets": lambda folder: targets(),
    "tiny_model": tiny_model,
    "small_models": small_models,
    "store_layout": store_layout,
    "failed_stage": failed_stage,
    "plans": plans,
    "results": results,
    "contents": contents,
}
"""File name -> what is in it, made in an empty working folder."""
