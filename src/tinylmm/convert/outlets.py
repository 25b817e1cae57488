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
_XLLAMACPP = """import base64, json, urllib.request, xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path, params.use_jinja = "FOLDER/model.gguf", "FOLDER/mmproj.gguf", True
server = xllamacpp.Server(params)
url = "data:image/png;base64," + base64.b64encode(open("cat.png", "rb").read()).decode()
parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
asked = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 64}
headers = {"Content-Type": "application/json"}
address = f"{server.listening_address}/v1/chat/completions"
reply = urllib.request.urlopen(urllib.request.Request(address, json.dumps(asked).encode(), headers))
print(json.load(reply)["choices"][0]["message"]["content"])"""
_NODE = """const { loadModel } = require("@fugood/llama.node");
(async () => {
  const model = await loadModel({ model: "FOLDER/model.gguf", n_ctx: 2048 });
  model.initMultimodal({ path: "FOLDER/mmproj.gguf" });
  const parts = [{ type: "image_url", image_url: { url: "cat.png" } }, { type: "text", text: "What is it?" }];
  const messages = [{ role: "user", content: parts }];
  const { text } = await model.completion({ messages, jinja: true, top_k: 1, penalty_repeat: 1, n_predict: 64 });
  console.log(text);
})();"""
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
            remark=f"RANK is `r` of adapter_config.json, or the next of 8, 16, 32, 64, 128, 256, 320 and 512. {_VLLM_WHICH}",
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
        Usage("Python, with `pip install xllamacpp`", _XLLAMACPP, "python", "It serves OpenAI's API, too."),
        Usage(
            "Node.js, with `npm install @fugood/llama.node @fugood/node-llama-linux-x64`",
            _NODE,
            "js",
            "Its own defaults penalise repetition; this is greedy.",
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
