// What llama.cpp makes of exported GGUF files: read from stdin, answered on the last line of stdout, both JSON.
//
// [{"model", "mmproj", "prompts": [{"prompt", "images"}], "tokens": n, "vocabulary": n, "texts": [...], "chat": [...]}]
// -> [{"answers", "lengths": [prompt's tokens, ...], "chances": [[[token's text, probability], ...], ...], "ids", "chat"}]
"use strict";
const { loadModel } = require("@fugood/llama.node");

// The binding's own defaults penalise repetition even where the temperature is 0.
const PLAIN = {
  penalty_repeat: 1, penalty_freq: 0, penalty_present: 0, penalty_last_n: 0, dry_multiplier: 0, dry_penalty_last_n: 0,
  xtc_probability: 0, seed: 1,
};
const GREEDY = { ...PLAIN, temperature: 0, top_k: 1 };
const WHOLE = { ...PLAIN, temperature: 1, top_k: 0, top_p: 1, min_p: 0, n_predict: 1 };

const kept = [];

// A new context a question: an old one goes on from what it remembers of the last one, and may still be at it.
async function withModel(job, use) {
  const model = await loadModel({
    model: job.model, n_ctx: 512, n_gpu_layers: 0, n_threads: 1, use_mmap: false,
    cache_type_k: "f32", cache_type_v: "f32", flash_attn_type: "off",
  });
  if (!model.initMultimodal({ path: job.mmproj, use_gpu: false })) throw new Error(`cannot read ${job.mmproj}`);
  kept.push(model); // releasing it while a thread of its own still ends the answer is a crash
  return use(model);
}

async function asked(job) {
  const answers = [], chances = [], lengths = [];
  for (const { prompt, images } of job.prompts) {
    const question = images.length ? { prompt, media_paths: images } : { prompt };
    const greedy = { ...question, ...GREEDY, n_predict: job.tokens };
    answers.push((await withModel(job, (model) => model.completion(greedy))).text);
    const whole = { ...question, ...WHOLE, n_probs: job.vocabulary };
    const first = await withModel(job, (model) => model.completion(whole));
    lengths.push(first.tokens_evaluated - first.tokens_predicted);
    chances.push(first.completion_probabilities[0].probs.map((p) => [p.tok_str, p.prob]));
  }
  return withModel(job, async (model) => {
    const { prompt } = await model.getFormattedChat(job.chat, undefined, { jinja: true });
    const ids = [];
    for (const text of job.texts) ids.push(Array.from((await model.tokenize(text)).tokens));
    return { answers, lengths, chances, ids, chat: prompt };
  });
}

async function main() {
  const found = [];
  for (const job of JSON.parse(require("fs").readFileSync(0, "utf8"))) found.push(await asked(job));
  process.stdout.write("\n" + JSON.stringify(found) + "\n");
}

main().catch((error) => { console.error(error); process.exit(1); });
