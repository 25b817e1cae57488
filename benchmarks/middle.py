"""What measurements of answering have in common: a random model of middle size, pictures, and questions as POPE asks them."""

from __future__ import annotations

import argparse
import os
import platform
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from benchmarks.arguments import file_to_write, whole
from tinylmm.config.description import ModelDescription
from tinylmm.config.identities import ConnectorIdentity, TowerOutput
from tinylmm.config.spec import ImageSpec
from tinylmm.data.chat import get_template
from tinylmm.models.checkpoint import LoadedModel, save_model
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower

OBJECTS = ("person", "car", "dog", "chair", "bottle", "cup", "traffic light", "dining table", "ball", "cell phone")
SUFFIX = "\nAnswer the question using a single word or phrase."
VOCAB = 32000
SPREAD = 0.1
"""Standard deviation of a saved model's weights."""
RESULTS = Path(__file__).parent / "results"


def options_of(
    description: str | None, words: Any, result: str, more: dict[str, tuple[Any, int, str]], **sizes: int
) -> argparse.Namespace:
    """Read a measurement's words.

    Args:
        result: file in `results/` that is written by default.
        more: its own whole numbers: how each is read, default, help.
        sizes: defaults of those that all have.
    """
    shared = {"images": 40, "questions": 20, "new_tokens": 3, "width": 384, "layers": 6, "size": 336} | sizes
    told = {
        "questions": "an image",
        "width": "of the language model",
        "layers": "of it",
        "size": "of images, in pixels",
    }
    kinds = {"width": whole(128, multiple_of=128), "size": whole(14)}
    parser = argparse.ArgumentParser(description=description.splitlines()[0] if description else None)
    for name, default in shared.items():
        kind = kinds.get(name, whole(1))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=told.get(name))
    for name, (kind, default, told_of_it) in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=told_of_it)
    parser.add_argument("--out", type=file_to_write, default=RESULTS / result)
    parser.add_argument("--note", default="", help="kept with the result, e.g. what else the machine was doing")
    return parser.parse_args(words)


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """Where something was measured, for its record."""
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "note": options.note,
    }


def middle_model(width: int, layers: int, size: int) -> LMM:
    """A random model of middle size: a Llama of this width, a tower for images of `size` pixels."""
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=2048,
        )
    )
    vision = SiglipVisionConfig(
        hidden_size=width * 3 // 4,
        intermediate_size=width * 3,
        num_hidden_layers=layers + 2,
        num_attention_heads=width * 3 // 128,
        image_size=size,
        patch_size=14,
    )
    tower = HFVisionTower(SiglipVisionModel(vision), -2, "patch", False)
    return LMM(llm, tower, MLPConnector(tower.hidden_size, width), "llama").eval()


def middle_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the words of the questions."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [get_template("llama").system, SUFFIX, *(f"Is there a {name} in the image?" for name in OBJECTS)] * 4
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def picture(draw: random.Random) -> Image.Image:
    """Coloured squares on a ground."""
    image = Image.new("RGB", (320, 240), tuple(draw.randrange(256) for _ in range(3)))
    for _ in range(6):
        patch = Image.new("RGB", (draw.randrange(20, 120),) * 2, tuple(draw.randrange(256) for _ in range(3)))
        image.paste(patch, (draw.randrange(300), draw.randrange(220)))
    return image


def yes_or_no(draw: random.Random) -> str:
    """A question as POPE asks them."""
    return f"Is there a {draw.choice(OBJECTS)} in the image?{SUFFIX}"


def saved_model(folder: Path, options: argparse.Namespace) -> Path:
    """The model in a folder, for a server to load; with weights so far apart that it answers each question otherwise, in words
    that its tokenizer has: equal answers would say nothing."""
    torch.manual_seed(0)
    description = ModelDescription.of_targets(
        "transformers.LlamaForCausalLM",
        "tinylmm.models.vision.HFVisionTower",
        "transformers.SiglipVisionModel",
        TowerOutput(select_layer=-2, select="patch", drop_first_token=False),
        ConnectorIdentity(**{"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}}),
        ImageSpec(size=options.size, mean=(0.5,) * 3, std=(0.5,) * 3, mode="squash", resample="bicubic"),
        "llama",
    )
    model, tokenizer = middle_model(options.width, options.layers, options.size), middle_tokenizer()
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.dim() > 1):
            parameter.normal_(0, SPREAD)
        model.llm.get_output_embeddings().weight[len(tokenizer) :] = 0  # type: ignore[operator]
    save_model(LoadedModel(model, tokenizer, description, None), folder, None, {})
    return folder
