// What llama.cpp makes of exported GGUF files: read from stdin, answered on the last line of stdout, both JSON.
//
// [a job of `answered` with "prompts": [{"prompt", "images"}], "texts": [...], "chat": [...]]
// -> [{"answers": [what it says to each prompt], "ids": [tokens of each text], "chat": the messages as a prompt}]
"use strict";
const { answered, follow, opened } = require("../../src/tinylmm/convert/outside/llama_cpp.js");

async function asked(job) {
  const answers = [], ids = [];
  for (const prompt of job.prompts) answers.push(await answered(job, prompt));
  const model = await opened(job);
  for (const text of job.texts) ids.push(Array.from((await model.tokenize(text)).tokens));
  const { prompt } = await model.getFormattedChat(job.chat, undefined, { jinja: true });
  return { answers, ids, chat: prompt };
}

follow(async (jobs) => {
  const found = [];
  for (const job of jobs) found.push(await asked(job));
  return found;
});
