"""transformers' own `LlavaForConditionalGeneration`, in the old key scheme (`language_model.model...`) and in the new one."""

from __future__ import annotations

from transformers import LlavaConfig

from tinylmm.convert.configs import make_config
from tinylmm.convert.connectors import MODULE
from tinylmm.convert.parts import Parts, causal_class
from tinylmm.convert.source import Source, read_json
from tinylmm.convert.tensors import Ledger, read_weights
from tinylmm.errors import UserError

OURS_FILE = "tinylmm.json"
"""What `tinylmm export --format hf` knows and transformers' own files cannot say; optional."""
SELECTS = {"default": "cut", "full": "all"}
_PROJECTOR = {"linear_1.": "0.", "linear_2.": "2."}


def read_transformers(source: Source) -> Parts:
    """Read the whole model; tensors of the added image token are cut off again where our own export added it."""
    config = source.config
    # LlavaConfig fills in what its parts leave out: old configs state only what differs from its own defaults.
    whole = LlavaConfig.from_dict({key: value for key, value in config.items() if key != "auto_map"})
    llm_config, tower_config = make_config(whole.text_config.to_dict()), make_config(whole.vision_config.to_dict())
    ledger = Ledger(read_weights(source.folder), str(source.folder))
    if ledger.has("model.language_model."):
        base = causal_class(llm_config).base_model_prefix
        llm = ledger.take("model.language_model.", f"{base}.") | ledger.take("lm_head.", "lm_head.")
        ledger.put(ledger.take("model."))
    else:
        llm = ledger.take("language_model.")
    tower, projector = ledger.take("vision_tower."), ledger.take("multi_modal_projector.")
    ledger.finish()
    ours = read_json(source.folder / OURS_FILE) if (source.folder / OURS_FILE).is_file() else {}
    rows = int(ours.get("vocab_size", llm_config.vocab_size))
    for name in ("lm_head.weight", f"{causal_class(llm_config).base_model_prefix}.embed_tokens.weight"):
        if rows < llm_config.vocab_size and name in llm:
            llm[name] = llm[name][:rows].clone()
    llm_config.vocab_size = rows
    source.template = source.template or ours.get("template")
    llm_config.tie_word_embeddings = whole.tie_word_embeddings
    layer = config.get("vision_feature_layer", -2)
    activation = str(config.get("projector_hidden_act", "gelu"))
    strategy = str(config.get("vision_feature_select_strategy", "default"))
    if not isinstance(layer, int) or activation not in ("gelu", "relu") or strategy not in SELECTS:
        raise UserError(
            f"{source.folder}: vision_feature_layer={layer}, projector_hidden_act={activation}, "
            f"vision_feature_select_strategy={strategy}; importable are one layer, gelu or relu, and default or full."
        )
    connector = {}
    for name, tensor in projector.items():
        prefix = next((p for p in _PROJECTOR if name.startswith(p)), "")
        connector[_PROJECTOR.get(prefix, "") + name.removeprefix(prefix)] = tensor
    options = {"depth": 2, "activation": activation}
    return Parts(
        llm_config=llm_config,
        tower_config=tower_config,
        llm=llm,
        tower=tower,
        connector=connector,
        connector_spec={"_target_": f"{MODULE}.MLPConnector", "options": options},
        select_layer=layer,
        select=SELECTS[strategy],
        aspect="pad" if ours.get("image_mode") == "pad" else None,
        tower_name=str(config["vision_config"].get("_name_or_path", "")),
        scales_images=False,
        llm_name=str(config["text_config"].get("_name_or_path", "")),
    )
