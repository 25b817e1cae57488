"""Claims about the image preprocessing in the spec: `square` is another name, and impossible values are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tinylmm.config.spec import ImageSpec
from tinylmm.data.transform import ImageTransform

IMAGE: dict[str, Any] = {"size": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "square"}


@pytest.mark.parametrize("own", ["squash", "center_crop"])
def test_square_names_the_same_run_as_the_towers_own_mode(own: str) -> None:
    named = ImageSpec.model_validate_json(json.dumps(IMAGE | {"square": own, "mode": own}))
    assert ImageSpec.model_validate_json(json.dumps(IMAGE | {"square": own})) == named and named.mode == own


def test_every_field_reaches_the_transform() -> None:
    spec = ImageSpec.model_validate(IMAGE | {"mode": "anyres", "short_edge": 256, "tiles": ((1, 2), (2, 2))})
    transform = ImageTransform(**spec.model_dump(mode="json"))
    assert transform.tiling is not None and transform.tiling.grids == [(1, 2), (2, 2)]
    assert (transform.short_edge, transform.size) == (256, 224)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_edge": 200}, "short_edge is 200, less than the size of 224"),
        ({"mode": "stretch"}, "'square', 'squash', 'center_crop', 'pad' or 'anyres'"),
        ({"tiles": []}, "at least 1"),
        ({"tiles": [[0, 2]]}, "greater than 0"),
    ],
)
def test_impossible_preprocessing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImageSpec.model_validate_json(json.dumps(IMAGE | change))
