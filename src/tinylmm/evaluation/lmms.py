"""A finished model under lmms-eval (extra `lmms`), for the benchmarks that are not built in.

    lmms-eval --model tinylmm --model_args pretrained=store/stages/train-0123/output/model --tasks mme

lmms-eval finds the model by the entry point `lmms_eval.models` of this package. Its tasks keep their own prompts and scorers,
so its numbers are protocol `lmms` (see the benchmarks' variants), not the papers'. Answers are greedy, whatever a task says
of sampling, and come from the same engine as ours. One process; images only, no video.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from torch import Tensor

from tinylmm.constants import IGNORE_INDEX
from tinylmm.data.chat import Turn, get_template
from tinylmm.data.images import as_rgb
from tinylmm.data.slots import expand, positions_of, question
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import DataError, UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.fixed import fixed_on_gpu
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.models.attention import choose_attention
from tinylmm.models.checkpoint import load_model
from tinylmm.models.devices import DTYPES, named_device, precision_on, to_precision
from tinylmm.store.find_model import find_model

log = logging.getLogger(__name__)

AUTO, ROWS = "auto", 64
DEFAULT_NEW_TOKENS = 128
"""Where a task names no `max_new_tokens`; LLaVA's scripts use as many."""


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval's registry."""
    return ModelManifest("tinylmm", simple_class_path=f"{__name__}.TinyLMM")


class TinyLMM(lmms):
    """A model folder that `tinylmm-train` has written, as lmms-eval's "simple" kind of model.

    Args:
        pretrained: a model, stage or run folder, or the name of a run in the store that TINYLMM_STORE names.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; by default the GPU where there is one.
        precision: of the weights, fp32, bf16 or fp16; by default (`auto`) bf16 on a GPU, else fp32.
        batch_size: most prompts at once, or `auto`; lmms-eval's own default of 1 is as good, as answers do not depend on it.
        tokens: most tokens, of prompts and answers, at once.
        max_batch_size: most prompts at once where `batch_size` is `auto`.
        template: chat template; by default the one that the model was trained with.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        precision: str = AUTO,
        batch_size: int | str = AUTO,
        tokens: int | str = 32768,
        max_batch_size: int | str | None = None,
        template: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(
                f"tinylmm models take pretrained, device, precision, batch_size, max_batch_size, tokens and template; "
                f"found {', '.join(unknown)} too. Remove it from --model_args."
            )
        if precision not in (AUTO, *DTYPES):
            raise UserError(f"precision={precision} is none of {AUTO}, {', '.join(DTYPES)}; correct --model_args.")
        loaded = load_model(find_model(pretrained), [])
        self._device = named_device(device or "auto")
        precision = precision_on(self._device, precision)
        to_precision(loaded.model, self._device, DTYPES[precision])
        loaded.model.set_attention(choose_attention("auto", precision, self._device))
        self.model = loaded.model.eval()
        self.prompts = PromptMaker(get_template(template or loaded.description.template), loaded.tokenizer)
        self.rows, self.tokens = _rows(batch_size, max_batch_size), _count("tokens", tokens)
        self._fixed = fixed_on_gpu(self.model.llm, self.prompts.ends, self.tokens)
        self._transform = ImageTransform.of(loaded.description.image)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Most prompts at once."""
        return self.rows

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer greedily, in the order of the requests; an answer ends before the first of the task's `until` texts."""
        images: dict[str, Image.Image] = {}
        prompts: list[Prompt] = []
        for index, request in enumerate(requests):
            context, options, *where = request.args
            keys = self._register(self._visuals(*where), images)
            counts = [self.model.tokens_of(*images[key].size) for key in keys]
            prompt = self.prompts.prompt(str(index), [question(context, len(keys))], keys, counts)
            prompts.append(replace(prompt, limit=int(options.get("max_new_tokens", DEFAULT_NEW_TOKENS))))
            if options.get("do_sample") and options.get("temperature", 1):
                log.warning("task %s asks for sampling; it is answered greedily", request.task_name)
        answers: dict[int, str] = {}
        for reply in (reply for batch in self._engine(images, prompts).replies(prompts) for reply in batch):
            answers[int(reply.item_id)] = self.prompts.text(reply.ids)
        return [_cut(answers[index], request.args[1].get("until")) for index, request in enumerate(requests)]

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation as the model's answer: summed log-probability (nats), and whether it is the greedy one."""
        found = []
        for request in requests:
            context, continuation, *where = request.args
            visuals = [as_rgb(visual) for visual in self._visuals(*where)]
            turn = question(context, len(visuals), str(continuation).strip())
            ids, targets = self._rendered(turn, visuals)
            embeddings = self._embed(ids, visuals)
            logits: Tensor = self.model.llm(inputs_embeds=embeddings).logits[0, :-1].float()
            wanted = torch.tensor(targets[1:], device=self._device)
            spoken = wanted != IGNORE_INDEX
            chosen, wanted = logits[spoken].log_softmax(-1), wanted[spoken]
            total = chosen.gather(1, wanted[:, None]).sum()
            found.append((float(total), bool((chosen.argmax(-1) == wanted).all())))
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: no multi-round task shows its later images through this interface."""
        raise UserError("tinylmm models answer single-round tasks only; choose another task.")

    def _visuals(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> list[Image.Image]:
        """The images of a document, in order.

        Raises:
            DataError: it has a video or anything else that is no image.
        """
        found = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual is not None else []
        visuals = [visual for visual in found or [] if visual is not None]
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise DataError(
                    f"task {task}, document {doc_id}: holds a {type(visual).__name__}; tinylmm models take images only."
                )
        return visuals

    def _register(self, visuals: Sequence[Image.Image], images: dict[str, Image.Image]) -> list[str]:
        """Keys by content: questions about one image share its computation, wherever each has its copy from."""
        keys = []
        for visual in visuals:
            picture = as_rgb(visual)
            key = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
            images.setdefault(key, picture)
            keys.append(key)
        return keys

    def _rendered(self, turn: Turn, visuals: Sequence[Image.Image]) -> tuple[list[int], list[int]]:
        """Ids of a question with its answer, placeholders expanded, and the answer's words as targets."""
        rendered = self.prompts.template.render([turn], self.prompts.tokenizer)
        positions = positions_of(rendered.input_ids, [self.model.tokens_of(*visual.size) for visual in visuals])
        ids, targets = expand(rendered.input_ids, positions), expand(rendered.labels, positions)
        last = max(place for place, label in enumerate(targets) if label != IGNORE_INDEX)
        if targets[last] in self.prompts.ends:  # the end of the answer is no part of the continuation
            targets[last] = IGNORE_INDEX
        return ids, targets

    def _embed(self, ids: Sequence[int], visuals: Sequence[Image.Image]) -> Tensor:
        """(1, L, Dl) of ids with expanded placeholders and their images."""
        views = [pixels if pixels.ndim == 4 else pixels[None] for pixels in map(self._transform, visuals)]
        features = self.model.tower_features(torch.cat(views)) if visuals else None
        sizes = torch.tensor([visual.size for visual in visuals]) if visuals and self.model.tiled else None
        return self.model.embed(torch.tensor([ids], device=self._device), None, features, sizes)[0]

    def _engine(self, images: dict[str, Image.Image], prompts: Sequence[Prompt]) -> Engine:
        most = max((prompt.limit or 0 for prompt in prompts), default=1)
        return Engine(
            self.model,
            lambda key: self._transform(images[key]),
            self.prompts.ends,
            Sampling(max_new_tokens=most),
            rows=self.rows,
            tokens=self.tokens,
            sizes={key: image.size for key, image in images.items()} if self.model.tiled else None,
            fixed=self._fixed,
        )


def _rows(wanted: int | str, most: int | str | None) -> int:
    """How many prompts at once; `auto`, or lmms-eval's `auto:N`, is a number that fits, as `tokens` holds the memory too."""
    if str(wanted).partition(":")[0] != AUTO:
        return _count("batch_size", wanted)
    return ROWS if most is None else min(ROWS, _count("max_batch_size", most))


def _count(name: str, value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        allowed = "a number of 1 or more" + (" or auto" if name == "batch_size" else "")
        raise UserError(f"{name}={value} is not {allowed}; correct --{name} or --model_args.")
    return int(value)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop texts, stripped."""
    stops = [until] if isinstance(until, str) else list(until or [])
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)].strip() if ends else text.strip()
