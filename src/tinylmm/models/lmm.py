"""The large multimodal model: vision tower, connector and LLM, fused at placeholder tokens.

Shapes: R rows of L tokens (a row may hold several samples), N images and clips, P tower tokens an image, Q connector tokens an
image, Dv and Dl the widths of tower and LLM, S supervised positions, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinylmm.config.attention import FLASH, VARLEN
from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID, Extent
from tinylmm.models.anyres import TiledConnector, clip_tokens
from tinylmm.models.attention import BY_SAMPLES, attend_by_samples, decode_rows, set_attention
from tinylmm.models.connectors import Connector
from tinylmm.models.fused import NeededOnly
from tinylmm.models.layout import Layout, layout_of
from tinylmm.models.llm import PACKS, decoder_of
from tinylmm.models.loss import supervised_cross_entropy
from tinylmm.models.video_connectors import joined
from tinylmm.models.vision import HFVisionTower


@dataclass
class LMMOutput:
    """What a training forward returns.

    Attributes:
        loss_sum: scalar, cross-entropy summed over the supervised positions (nats).
        num_supervised: scalar int64, their number.
    """

    loss_sum: Tensor
    num_supervised: Tensor


class LMM(nn.Module):
    """Tower + connector + causal LLM.

    Args:
        llm: a causal LM of transformers (or of its interface).
        vision_tower: see `models/vision.py`.
        connector: built for exactly these two widths.
        template: name of the chat template it is trained with; travels with the saved model.
        scale_image_features: multiply the connector's output by sqrt(Dl), as TinyLLaVA Factory's Gemma models do.
    """

    def __init__(
        self,
        llm: nn.Module,
        vision_tower: HFVisionTower,
        connector: Connector,
        template: str,
        scale_image_features: bool = False,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.vision_tower = vision_tower
        self.connector = connector
        self.template = template
        table = llm.get_input_embeddings()  # type: ignore[operator]
        # An embedding never trains its padding_idx, which in some checkpoints is the end of a turn too (SmolLM2). Our
        # padding carries no loss and attends to itself alone, so its row needs no such protection.
        table.padding_idx = None
        self.image_scale = table.weight.shape[1] ** 0.5 if scale_image_features else 1.0
        self.needed = NeededOnly()
        self.residual_type: torch.dtype | None = None
        """What goes from block to block of the LLM in training; None is what the embeddings have."""
        self.blank_image: Literal["none", "connector", "tower"] = "none"
        """Set where ranks must run the same modules: a micro-batch without images then sends a blank one through the
        connector, or through the tower and the connector."""

    @property
    def config(self) -> Any:
        """The LLM's config; Trainer and DeepSpeed read sizes from it."""
        return self.llm.config

    @property
    def packs(self) -> bool:
        """Whether samples that share a row stay apart in this LLM; only `llm=hf` can bring one in which they do not."""
        used = self.config.get_text_config()._attn_implementation
        return self._packs_under(FLASH if used == BY_SAMPLES else used)

    @property
    def by_samples(self) -> bool:
        """Whether the LLM attends to each sample of a row by itself, so that a row costs no more than its samples do."""
        return self.config.get_text_config()._attn_implementation == BY_SAMPLES

    def _packs_under(self, attention: str) -> bool:
        examined = getattr(self.llm, PACKS, None)
        return examined is None or attention in examined

    def set_attention(self, chosen: str) -> None:
        """Turn to the attention that was chosen: LLM and tower to flash-attn, once they compute in bf16 or fp16 on a GPU, or
        the LLM to varlen, where both leave alone what has no such attention."""
        if chosen == VARLEN and self._packs_under(FLASH):
            attend_by_samples(cast(PreTrainedModel, self.llm))
            return
        for part in (self.llm, self.vision_tower.encoder):
            set_attention(cast(PreTrainedModel, part), chosen)

    @property
    def image_tokens(self) -> int:
        """Q, placeholders an image takes in a sequence; where images are tiled, `tokens_of` says it for each."""
        return self.connector.num_tokens(self.vision_tower.num_tokens)

    @property
    def tiled(self) -> bool:
        """Whether images come in tiles (`anyres`), so that each takes placeholders after its size."""
        return isinstance(self.connector, TiledConnector)

    def tokens_of(self, width: int, height: int, frames: int = 0) -> int:
        """Placeholders that an image of this size in pixels takes, or a clip of so many frames of whatever size."""
        if frames:
            return self.tokens_of_clip(frames)
        return (
            self.connector.tokens_of(width, height) if isinstance(self.connector, TiledConnector) else self.image_tokens
        )

    def tokens_of_clip(self, frames: int) -> int:
        """Placeholders that a clip of so many frames takes: its frames' one behind the other, or those of all together."""
        return clip_tokens(self.connector, self.vision_tower.num_tokens, frames)

    def extents(self, seen: Sequence[Extent]) -> dict[str, Tensor]:
        """The arguments of `forward` and `embed` that say what images and clips are like; none where all are alike."""
        frames = [extent[2] if len(extent) == 3 else 0 for extent in seen]
        found = {"image_sizes": torch.tensor([extent[:2] for extent in seen])} if seen and self.tiled else {}
        return found | ({"frames": torch.tensor(frames)} if any(frames) else {})

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_sizes: Tensor | None = None,
        frames: Tensor | None = None,
        loss_chunks: int | None = None,
        layout: Layout | None = None,
    ) -> LMMOutput:
        """Return the summed loss of packed rows.

        Args:
            input_ids: (R, L) int64; `IMAGE_TOKEN_ID` marks image tokens.
            position_ids: (R, L) int64, restarting at 0 with each sample; attention never crosses a restart.
            targets: (R, L) int64, the token to predict at each position, IGNORE_INDEX where there is none (already shifted).
            pixel_values: (N, 3, H, W), or
            image_features: (N, P, Dv), the frozen tower's output computed before; neither if no row has an image.
            image_sizes: (N, 2) int64, width and height of each image, where images are tiled; N is then T, the tiles of
                all images, in the two above.
            frames: (N,) int64, how many frames each clip has, 0 for an image; where there are clips, N in the two above is
                all their frames too.
            loss_chunks: how often the output head is run, where ranks must agree on it (`models/loss.py`).
            layout: of the rows, where it is known already: asking a GPU for it makes the process wait.

        Raises:
            ValueError: placeholders and features disagree in number.
        """
        layout = layout_of(input_ids, position_ids, targets) if layout is None else layout
        embeddings, blank = self.embed(input_ids, pixel_values, image_features, image_sizes, frames, layout["images"])
        if self.residual_type is not None:
            embeddings = embeddings.to(self.residual_type)
        learnt = layout["supervised"]
        self.needed.positions = learnt
        hidden = decode_rows(decoder_of(self.llm), embeddings, position_ids, layout)
        hidden, words = hidden.flatten(0, 1).index_select(0, learnt), targets.flatten().index_select(0, learnt)
        loss_sum = supervised_cross_entropy(self.llm, hidden, words, loss_chunks)
        if blank is None and self.training and torch.is_grad_enabled() and not loss_sum.requires_grad:
            blank = self._blank_features(embeddings)  # text alone through a frozen LLM: backward still needs a graph
        if blank is not None:
            loss_sum = loss_sum + 0.0 * blank.float().sum()
        return LMMOutput(loss_sum=loss_sum, num_supervised=(targets != IGNORE_INDEX).sum())

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        image_sizes: Tensor | None = None,
        frames: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed tokens and put image features at their placeholders: (R, L) ids to (R, L, Dl).

        `places`, (I,) int64, says where those are, end to end, where it is known already. The second value is a blank image's
        features (or None): it takes no part in the result, only in the graph.
        """
        is_image = input_ids == IMAGE_TOKEN_ID
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # type: ignore[operator]
        features = self.image_embeddings(pixel_values, image_features, image_sizes, frames)
        places = is_image.flatten().nonzero().flatten() if places is None else places
        placeholders = len(places)
        available = 0 if features is None else features.shape[:-1].numel()
        if placeholders != available:
            listed = image_sizes if frames is None else frames
            images = 0 if features is None else len(features) if listed is None else len(listed)
            each = f"{self.image_tokens} tokens" if listed is None else "different sizes"
            raise ValueError(
                f"the batch has {placeholders} image placeholders but {available} image features "
                f"({images} images of {each})"
            )
        if features is None:
            needed = self.blank_image != "none" and self.training
            return embeddings, self._blank_features(embeddings) if needed else None
        flat = (features.reshape(-1, features.shape[-1]) * self.image_scale).to(embeddings.dtype)
        return embeddings.flatten(0, 1).index_copy(0, places, flat).view_as(embeddings), None

    def image_embeddings(
        self,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        image_sizes: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor | None:
        """Return (N, Q, Dl) from pixels (N, 3, H, W) or from tower features (N, P, Dv); None if there are no images.

        Of tiled images, whose sizes must be given, it is all their tokens, (sum of `tokens_of`, Dl). So it is with `frames`,
        where clips are among them, but for a connector that gives all of them as many tokens.
        """
        if image_features is None:
            if pixel_values is None:
                return None
            image_features = self.tower_features(pixel_values)
        weight = next(self.connector.parameters(), None)
        if weight is not None:
            image_features = image_features.to(weight.device)
        if isinstance(self.connector, TiledConnector):
            if image_sizes is None:
                raise ValueError("this model takes images in tiles (anyres): the sizes of the images are needed too")
            return cast(Tensor, self.connector(image_features, image_sizes, frames))
        if frames is not None and self.connector.takes_clips:
            return cast(Tensor, self.connector(*joined(image_features, [max(1, clip) for clip in frames.tolist()])))
        return cast(Tensor, self.connector(image_features))

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, P, Dv), without a graph where nothing in the tower is trained."""
        parameter = next(self.vision_tower.parameters())
        trained = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return cast(Tensor, self.vision_tower(pixel_values.to(parameter.device, parameter.dtype)))

    def _blank_features(self, like: Tensor) -> Tensor:
        if self.blank_image == "tower" or any(p.requires_grad for p in self.vision_tower.parameters()):
            size = self.vision_tower.image_size
            return cast(Tensor, self.connector(self.tower_features(like.new_zeros(1, 3, size, size))))
        return cast(
            Tensor, self.connector(like.new_zeros(1, self.vision_tower.num_tokens, self.vision_tower.hidden_size))
        )
