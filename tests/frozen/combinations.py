"""The runs whose digests are frozen. Each says in its name what it is about.

Not every recipe with all parts: so many that every recipe, and every field that is in a digest, occurs, the fields with a
value that is not their default too. `python -m tests.frozen.write` refuses to write digests of which a field never varies.
"""

from __future__ import annotations

PUBLISHED = ["llm=phi2", "vt=siglip"]
LLAVA = [*PUBLISHED, "data=llava_v1_5", "eval=none"]
MODEL = "recipe.from_model=model"
"""A folder that `record.py` writes: recipes that start from a model need one to read the parts from."""
OWN = ["recipe=custom_finetune", MODEL, "data.root=/data", "data.sources.finetune.annotations=mine.json"]
FINETUNE, PRETRAIN = "recipe.stages.finetune", "recipe.stages.pretrain"
SOURCE = "data.sources.finetune"

COMBINATIONS: dict[str, list[str]] = {
    # recipes, on embedded and on published parts
    "default": [],
    "nano share": ["recipe=share"],
    "nano share_factory": ["recipe=share_factory"],
    "nano full": ["recipe=full"],
    "nano lora": ["recipe=lora"],
    "nano qlora": ["recipe=qlora"],
    "nano eval=none": ["eval=none"],
    "base": LLAVA,
    "share": [*PUBLISHED, "recipe=share"],
    "share_factory": [*PUBLISHED, "recipe=share_factory"],
    "bench": [*PUBLISHED, "recipe=bench"],
    "share_bench": [*PUBLISHED, "recipe=share_bench"],
    "image mode of a stage": [*LLAVA, "vt.image.mode=pad", f"{PRETRAIN}.image_mode=square"],
    "full": [*PUBLISHED, "recipe=full"],
    "lora": [*PUBLISHED, "recipe=lora"],
    "qlora": [*PUBLISHED, "recipe=qlora"],
    "custom_finetune": [*OWN, "eval=none"],
    "custom_finetune on digits": ["recipe=custom_finetune", MODEL, "data=digits"],
    "custom_finetune in full, with benchmark": [*OWN, "eval=gqa", f"{FINETUNE}.tune.llm=full"],
    # parts
    "tinyllama clip": ["llm=tinyllama", "vt=clip", "connector=linear"],
    "qwen2_5 siglip2": ["llm=qwen2_5_0_5b", "vt=siglip2", "connector=resampler", "recipe=share"],
    "gemma dinov2": ["llm=gemma", "vt=dinov2", "connector=qformer"],
    "openelm mof": ["llm=openelm_270m", "vt=mof", "connector=mof_mlp"],
    "openelm mof reference": ["llm=openelm", "vt=mof", "connector=mof_mlp", "vt.options.reference=true"],
    "hf hf": ["llm=hf", "llm.pretrained=org/llm", "vt=hf", "vt.pretrained=org/tower", "connector=identity"],
    "stablelm2 dinov3": ["llm=stablelm2", "vt=dinov3", "connector=ldp_v2"],
    "gemma3 clip_224": ["llm=gemma3_270m", "vt=clip_224", "connector=pixel_shuffle_mlp"],
    "gemma2 clip_b16": ["llm=gemma2_2b", "vt=clip_b16", "connector=avgpool_mlp"],
    "qwen3 siglip2_base": ["llm=qwen3_0_6b", "vt=siglip2_base", "connector=ldp"],
    "smollm2 siglip": ["llm=smollm2_360m", "vt=siglip", "connector=resampler_bench"],
    "nano llm, published tower": ["vt=siglip", "data=digits", "eval=digits"],
    "published llm, nano tower": ["llm=phi2", "data=digits", "eval=none"],
    # videos
    "videos": ["recipe=video", "connector=group_resampler", "data=digits", "eval=none"],
    "videos at a rate": ["video.sampling={fps: 1, max: 8}", "eval.digits.sampling={uniform: 4}"],
    "videos without time": ["eval.digits.frames=middle", "eval.digits.sampling={uniform: 4}"],
    "moving digits": ["llm=nano_video", "vt=nano_video", "recipe=video"],
    "videos in parts": ["video.sampling={segments: 4}", "eval.digits.sampling={left_edge: 4}"],
    # fields of parts
    "random parts": [*LLAVA, "llm.init=random", "vt.init=random", "llm.revision=gone", "vt.revision=gone"],
    "random nano": ["llm.init=random", "vt.init=random", "llm.tokenizer.vocab_size=300", "data=digits", "eval=digits"],
    "revisions": [*LLAVA, "llm.revision=abc", "vt.revision=def", "llm.tokenizer.revision=ghi"],
    "local folders": [
        *LLAVA,
        "llm.pretrained=/models/phi",
        "vt.pretrained=/models/siglip",
        "llm.tokenizer.pretrained=/models/tokenizer",
    ],
    "mof of a folder and an id": ["llm=phi2", "vt=mof", "connector=mof_mlp", "vt.pretrained=/models/clip+org/dino"],
    "pad token and chat template": [*LLAVA, "llm.tokenizer.pad_token='<pad>'", "llm.template=llama"],
    "architecture": [*LLAVA, "llm.architecture.resid_pdrop=0.0", "vt.architecture.attention_dropout=0.1"],
    "tower output": [*LLAVA, "vt=clip", "vt.select_layer=-1", "vt.select=all"],
    "drop_first_token": [*LLAVA, "vt.drop_first_token=true"],
    "image by pad": [*LLAVA, "vt.image.mode=pad", "vt.image.size=392", "vt.image.resample=bilinear"],
    "image by center_crop": [*LLAVA, "vt=dinov2", "vt.image.short_edge=300", "vt.image.mean=[0.4,0.5,0.6]"],
    "image in tiles": [*LLAVA, "vt.image.mode=anyres", "vt.image.tiles=[[1,2],[2,2]]", "vt.image.std=[0.4,0.5,0.6]"],
    "scale_image_features": [*LLAVA, "llm.scale_image_features=true"],
    "scale_image_features off": ["llm=gemma", "vt=siglip", "llm.scale_image_features=false", "eval=none"],
    "connector options": [*LLAVA, "connector.options.depth=3", "connector.options.activation=relu"],
    "part builds": [
        *["llm.build.steps=7", "llm.build.batch=3", "llm.build.lr=1e-4", "llm.build.warmup_ratio=0.2"],
        *["llm.build.weight_decay=0.1", "llm.build.max_length=99", "llm.build.seed=5", "llm.build.source=finetune"],
        *["vt.build.steps=8", "vt.build.batch=4", "vt.build.lr=1e-3", "vt.build.warmup_ratio=0.3"],
        *["vt.build.weight_decay=0.2", "vt.build.max_length=33", "vt.build.seed=6", "vt.build.source=share_pretrain"],
        *["vt.build.text_tower.layers=3", "llm.tokenizer.vocab_size=400", "llm.tokenizer.pad_token='<pad>'"],
        *["llm.build.data.sources.finetune.limit=50", "vt.build.data.build.seed=4"],
    ],
    "image and origin of built parts": [
        *["vt.image={size: 64, mean: [0.1,0.1,0.1], std: [0.3,0.3,0.3], mode: square, square: center_crop}"],
        *["vt.image.resample=bilinear", "vt.image.short_edge=70", "vt.image.tiles=[[1,2]]", "vt.revision=gone"],
        *["vt.pretrained=gone", "vt.encoder=transformers.CLIPVisionModel", "llm.revision=gone", "llm.pretrained=gone"],
        *["vt.build.data.sources.pretrain.format=auto", "vt.build.data.sources.pretrain.on_bad=skip"],
        "vt.build.data.sources.pretrain.max_bad=3",
    ],
    # fields of training
    "seed": [*LLAVA, "seed=3"],
    "trainer": [*LLAVA, "trainer.optim=adafactor"],
    "stage numbers": [
        *LLAVA,
        f"{FINETUNE}.lr=3e-5",
        f"{FINETUNE}.global_batch=64",
        f"{FINETUNE}.epochs=2.5",
        f"{FINETUNE}.max_length=1024",
        f"{FINETUNE}.warmup_ratio=0.1",
        f"{FINETUNE}.weight_decay=0.01",
        f"{FINETUNE}.adam_betas=[0.9,0.95]",
        f"{FINETUNE}.adam_epsilon=1e-6",
        f"{FINETUNE}.max_grad_norm=0.5",
    ],
    "stage words": [
        *LLAVA,
        f"{PRETRAIN}.schedule=linear",
        f"{PRETRAIN}.precision=fp16",
        f"{PRETRAIN}.template=plain",
        f"{FINETUNE}.schedule=constant",
        f"{FINETUNE}.precision=fp32",
        f"{FINETUNE}.template=phi3",
        f"{FINETUNE}.max_steps=11",
    ],
    "lr per part": [*LLAVA, f"{FINETUNE}.lr={{llm: 1e-5, connector: 1e-4}}"],
    "tune per part": [
        *LLAVA,
        f"{PRETRAIN}.tune={{llm: {{from_layer: 20}}, vision_tower: {{from_layer: 0.25}}, connector: full}}",
        f"{FINETUNE}.tune={{llm: lora, vision_tower: full, connector: frozen}}",
    ],
    "adapters on the tower": [
        *LLAVA,
        f"{PRETRAIN}.tune.vision_tower=lora",
        f"{FINETUNE}.tune={{llm: qlora, vision_tower: {{lora: {{r: 2}}}}, connector: full}}",
    ],
    "lora numbers": [
        *PUBLISHED,
        "recipe=lora",
        f"{FINETUNE}.tune.llm.lora={{r: 8, alpha: 4, dropout: 0.5, targets: [q_proj, v_proj], bias: all, rslora: true}}",
    ],
    "qlora numbers": [
        *PUBLISHED,
        "recipe=qlora",
        f"{FINETUNE}.tune.llm.qlora={{bits: 4, quant_type: fp4, double_quant: false, r: 8, alpha: 4, dropout: 0.0, "
        "targets: [q_proj], bias: lora_only, rslora: true}",
    ],
    "qlora of eight bits": [*PUBLISHED, "recipe=qlora", f"{FINETUNE}.tune.llm.qlora={{bits: 8}}"],
    "a third stage": [
        "recipe=share",
        "recipe.stages.again={from: pretrain, data: text, tune: {llm: full}, lr: 1e-3, global_batch: 8, "
        "max_length: 64, template: llama}",
    ],
    # fields of data
    "sharegpt4v with base": [*PUBLISHED, "data=sharegpt4v", "recipe=base", "eval=none"],
    "custom data": [
        *PUBLISHED,
        "data=custom",
        "data.root=/data",
        f"{SOURCE}.annotations=a.json",
        f"{PRETRAIN}.data=finetune",
    ],
    "openai": [*LLAVA, f"{SOURCE}.format=openai", f"{SOURCE}.annotations=mine.jsonl"],
    "sharegpt": [*LLAVA, f"{SOURCE}.format=sharegpt"],
    "parquet": [*LLAVA, f"{SOURCE}.format=parquet", f"{SOURCE}.annotations=folder"],
    "format=auto": [*LLAVA, f"{SOURCE}.format=auto", "data.sources.pretrain.format=auto"],
    "limit and bad records": [*LLAVA, f"{SOURCE}.limit=1000", f"{SOURCE}.on_bad=skip", f"{SOURCE}.max_bad=20"],
    "digits": [
        *["data=digits", "data.build.seed=2", "data.build.options.finetune=9", "data.sources.pretrain.limit=4"],
        *["data.sources.finetune.on_bad=skip", "data.sources.finetune.max_bad=2", "data.sources.finetune.format=auto"],
        *["data.sources.finetune.images=elsewhere", "data.sources.finetune.annotations=text.json"],
    ],
    "mixture": [*LLAVA, f"{FINETUNE}.data={{finetune: 1.0, pretrain: 0.5}}"],
    "mixture in digits": [
        f"{FINETUNE}.data={{share_pretrain: 0.5, finetune: 1, text: 2}}",
        f"{PRETRAIN}.data={{text: 2}}",
    ],
    # fields of evaluations
    "gqa": [*PUBLISHED, "eval=gqa"],
    "pope with variant": [*PUBLISHED, "eval=pope", "eval.pope.variant=official", "eval.pope.blind=true"],
    "mmbench with options": [
        *PUBLISHED,
        "eval=mmbench",
        "eval.mmbench.options={split: test}",
        "eval.mmbench.layout=hf",
    ],
    "judges": [
        *PUBLISHED,
        "eval=[mmvet,llava_bench]",
        "eval.mmvet.judge={base_url: https://api.example.com/v1, model: judge-1, runs: 5}",
    ],
    "a judge asked three times": [
        *PUBLISHED,
        "eval=mmvet",
        "eval.mmvet.judge={base_url: https://api.example.com/v1, model: judge-1, runs: 3}",
    ],
    "a judge of what rules can score": [
        *[*PUBLISHED, "eval=mmbench", "eval.mmbench.judge={base_url: http://localhost:1/v1, model: judge-2}"],
        *["eval.mmbench.layout=hf", "eval.mmbench.options={split: dev}", "eval.mmbench.variant=lmms"],
        *["eval.mmbench.limit=9", "eval.mmbench.blind=true", "eval.mmbench.max_new_tokens=7"],
        *["eval.mmbench.template=llama", "eval.mmbench.precision=bf16"],
    ],
    "limit, template, precision": [
        *PUBLISHED,
        "eval=[gqa,sqa]",
        "eval.gqa.limit=5",
        "eval.gqa.template=llama",
        "eval.gqa.precision=bf16",
        "eval.gqa.max_new_tokens=3",
    ],
    "after=every": [*PUBLISHED, "recipe=share", "eval=[vqav2,textvqa]", "eval.vqav2.after=every"],
    "the papers' lists": [*PUBLISHED, "eval=[paper,factory,seed,vizwiz,qbench]"],
    "digits after the last stage": [
        *["eval=[digits,pope]", "eval.digits.after=last", "eval.digits.blind=false", "eval.digits.limit=6"],
        *["eval.digits.template=phi", "eval.digits.variant=exact-match-v1", "eval.digits.source=finetune"],
        *["eval.digits.precision=fp16", "eval.digits.data.build.options.test=3"],
        *["eval.digits.data.sources.finetune={images: there, limit: 3, on_bad: skip, max_bad: 1}"],
    ],
}

NAMES_AND_PLACES: dict[str, tuple[str, list[str]]] = {
    "launch": (
        "default",
        [
            *["launch=zero2", "launch.nproc=2", "launch.device=cpu", "launch.micro_batch=3", "launch.packing=false"],
            *["launch.row_tokens=900", "launch.num_workers=4", "launch.attention=eager"],
            *["launch.gradient_checkpointing=true", "launch.cache_features=false", "launch.cache_features_gib=1"],
            *["launch.cache_pixels=true", "launch.cache_pixels_gib=1"],
            *["launch.save_steps=7", "launch.save_minutes=1", "launch.keep_checkpoints=3", "launch.start_timeout_s=5"],
            *["launch.step_timeout_s=5", "launch.eval_batch=2", "launch.eval_tokens=1000"],
        ],
    ),
    "launch=torchrun": ("share", [*COMBINATIONS["share"], "launch=torchrun", "launch.nproc=3"]),
    "launch=zero3": ("full", [*COMBINATIONS["full"], "launch=zero3"]),
    "tracking": (
        "default",
        [
            *["tracking.tensorboard=false", "tracking.wandb.enabled=true", "tracking.wandb.project=p"],
            *["tracking.wandb.entity=e", "tracking.log_steps=3"],
        ],
    ),
    "store, run name and trust": ("lora", [*COMBINATIONS["lora"], "store=/elsewhere", "name=mine", "trust=[mine]"]),
    "names of parts, recipe and data": (
        "default",
        [
            *["llm.name=a", "vt.name=b", "connector.name=c", "recipe.name=d", "data.name=e", "eval.digits.data.name=f"],
            *["recipe.published_data=g", "data.sources.finetune.how_to_get=h", "llm.build.data.name=i"],
        ],
    ),
    "root of the data": ("base", [*COMBINATIONS["base"], "data.root=/elsewhere"]),
    "root of a benchmark": ("gqa", [*COMBINATIONS["gqa"], "eval.gqa.root=/elsewhere"]),
    "place of a checkpoint": (
        "local folders",
        [word.replace("/models/", "/moved/") for word in COMBINATIONS["local folders"]],
    ),
    "the judge's address": (
        "judges",
        [word.replace("https://api.example.com/v1", "http://localhost:1/v1") for word in COMBINATIONS["judges"]],
    ),
    "order of a mixture": (
        "mixture",
        [
            word.replace("finetune: 1.0, pretrain: 0.5", "pretrain: 0.5, finetune: 1.0")
            for word in COMBINATIONS["mixture"]
        ],
    ),
    "mode=square, which squash is for this tower": ("base", [*COMBINATIONS["base"], "vt.image.mode=squash"]),
}
"""What it is about: (the combination whose digests these words have too, words)."""

SPECIMENS: dict[str, list[str]] = {
    "default": [
        *["digits", "tokenizer/nano", "llm/nano", "vision_tower/nano"],
        *["prepare[pretrain]", "pretrain", "finetune", "digits@finetune"],
    ],
    "gemma dinov2": ["prepare[finetune]", "pretrain"],
    "openelm mof": ["pretrain"],
    "local folders": ["prepare[pretrain]", "pretrain"],
    "image in tiles": ["pretrain"],
    "lora numbers": ["finetune"],
    "qlora numbers": ["finetune"],
    "lr per part": ["finetune"],
    "tune per part": ["pretrain", "finetune"],
    "mixture": ["prepare[finetune/pretrain]", "finetune"],
    "image mode of a stage": ["pretrain", "finetune"],
    "custom_finetune": ["prepare[finetune]", "finetune"],
    "mmbench with options": ["mmbench@finetune"],
    "judges": ["mmvet@finetune", "llava_bench@finetune"],
}
"""Combination -> stages whose whole identity is frozen beside its digest, so that a drift can be read."""

NEVER_VARY = {
    ("eval", "judge"),  # of no part in the answers
    ("prepare", "source.orientation"),  # in it only where it is applied
    ("eval", "rules"),  # in it only where a mend has changed what a variant scores
    ("judge", "rules"),
    *(("prepare", f"tokenizer.{name}") for name in ("content", "vocab_size")),
    *(("train", f"tokenizer.{name}") for name in ("content", "vocab_size")),
    *(("train", name) for name in ("llm.content", "model.content", "scale_image_features", "tune.llm.from_layer")),
    *(("train", f"tune.vision_tower.lora.{name}") for name in ("alpha", "bias", "dropout", "rslora", "targets")),
    # what is done about bad records decides nothing: the same stands in every identity
    *((kind, f"source.{name}") for kind in ("prepare", "parts", "eval") for name in ("on_bad", "max_bad")),
    ("parts", "init"),
    ("data", "build._target_"),
}
"""(kind, field) of an identity that is there or not, or that has one value wherever it is."""
