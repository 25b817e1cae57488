// llama.cpp in this process, through its npm binding: loads exported GGUF files and answers questions about pictures.
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
async function opened({ model, mmproj, context }) {
  const loaded = await loadModel({
    model, n_ctx: context, n_gpu_layers: 0, n_threads: 2, use_mmap: true,
    cache_type_k: "f32", cache_type_v: "f32", flash_attn_type: "off",
  });
  if (!loaded.initMultimodal({ path: mmproj, use_gpu: false })) throw new Error(`cannot read ${mmproj}`);
  kept.push(loaded); // releasing it while a thread of its own still ends the answer is a crash
  return loaded;
}

// {"model", "mmproj", "context", "tokens", "looked_at": n}, {"prompt", "images"}
// -> {"text", "length": the prompt's tokens, "chances": [[token's text, probability], ...] of the answer's first token}
async function answered(job, { prompt, images }) {
  const question = images.length ? { prompt, media_paths: images } : { prompt };
  const answer = await (await opened(job)).completion({ ...question, ...GREEDY, n_predict: job.tokens });
  const first = await (await opened(job)).completion({ ...question, ...WHOLE, n_probs: job.looked_at });
  const chances = first.completion_probabilities[0].probs.map((p) => [p.tok_str, p.prob]);
  return { text: answer.text, length: first.tokens_evaluated - first.tokens_predicted, chances };
}

// Do what stdin says, in JSON, and say what came of it on the last line of stdout.
async function follow(work) {
  try {
    const found = await work(JSON.parse(require("fs").readFileSync(0, "utf8")));
    process.stdout.write("\n" + JSON.stringify(found) + "\n");
  } catch (error) {
    console.error(error);
    process.exit(1);
  }
}

module.exports = { opened, answered, follow };
