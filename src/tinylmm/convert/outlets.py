"""What model cards say of our formats: which programs load a folder, how, and what to mind."""

from __future__ import annotations

from tinylmm.convert.format import Outlet, Usage

IMAGE_TEXT = "image-text-to-text"
_TAGS = ("tinylmm", "llava", "vision-language-model")
_TRANSFORMERS = """from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained("FOLDER")
model = LlavaForConditionalGeneration.from_pretrained("FOLDER")
parts = [{"type": "image", "image": Image.open("cat.png")}, {"type": "text", "text": "What is it?"}]
talk = [{"role": "user", "content": parts}]
inputs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""
_PEFT = (
    _TRANSFORMERS.replace('"FOLDER"', '"FOLDER/base"')
    .replace("parts =", 'model = PeftModel.from_pretrained(model, "FOLDER")\nparts =')
    .replace("from PIL", "from peft import PeftModel\nfrom PIL")
)
_VLLM = """vllm serve FOLDER --limit-mm-per-prompt '{"image": 4}' --mm-processor-kwargs '{"backend": "pil"}'"""
_VLLM_WHICH = (
    "vLLM has LLMs of the kinds Llama, Qwen2, Qwen3, Gemma and StableLM, and towers CLIP and SigLIP; for equal answers compute "
    "in float32 on both sides (`--dtype float32`), and let Pillow resize images, as training does (`backend`)."
)

HF = Outlet(
    "transformers",
    _TAGS,
    (
        Usage("transformers", _TRANSFORMERS, "python"),
        Usage("vLLM", _VLLM, remark=_VLLM_WHICH),
        Usage(
            "tinylmm",
            "tinylmm import FOLDER MODEL && tinylmm serve MODEL",
            remark="`tinylmm chat` and `demo` take MODEL, too.",
        ),
        Usage(
            "llama.cpp and Ollama",
            "tinylmm import FOLDER MODEL && tinylmm export MODEL MODEL-gguf --to gguf --verify",
            remark="They read GGUF files, which this makes of a SigLIP tower and an MLP connector.",
        ),
    ),
)

ADAPTER = Outlet(
    "peft",
    (*_TAGS, "lora", "peft"),
    (
        Usage(
            "transformers and peft",
            _PEFT,
            "python",
            "The base that the adapter was trained on lies beside it, in `base`, with the connector as it was trained.",
        ),
        Usage(
            "vLLM",
            _VLLM.replace("FOLDER", "FOLDER/base") + " --enable-lora --max-lora-rank RANK --lora-modules NAME=FOLDER",
            remark=f"RANK is `r` of adapter_config.json. {_VLLM_WHICH}",
        ),
        Usage("tinylmm", "tinylmm import FOLDER MODEL --llm FOLDER/base && tinylmm serve MODEL"),
    ),
)

GGUF = Outlet(
    "llama.cpp",
    (*_TAGS, "gguf"),
    (
        Usage(
            "llama.cpp",
            'llama-mtmd-cli -m FOLDER/model.gguf --mmproj FOLDER/mmproj.gguf --image cat.png -p "What is it?" --temp 0\n'
            "llama-server -m FOLDER/model.gguf --mmproj FOLDER/mmproj.gguf",
        ),
        Usage(
            "Ollama",
            "cd FOLDER && ollama create NAME -f Modelfile && ollama run NAME",
            remark="The Modelfile has no TEMPLATE, so that the chat template of the file counts.",
        ),
    ),
    ("Send pictures of the tower's size: llama.cpp prepares all others in a way of its own.",),
)

FACTORY = Outlet(
    None,
    (*_TAGS, "tinyllava"),
    (
        Usage(
            "TinyLLaVA Factory",
            "# --model_name_or_path FOLDER of the Factory's own scripts",
            remark="It loads tokenizer and image processor by the names in config.json.",
        ),
        Usage("tinylmm", "tinylmm import FOLDER MODEL && tinylmm serve MODEL"),
    ),
)
