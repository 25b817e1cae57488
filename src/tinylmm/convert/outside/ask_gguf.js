// What llama.cpp makes of exported GGUF files: read from stdin, answered on the last line of stdout, both JSON.
//
// A job of `answered` with "questions": [{"prompt", "images"}] -> what it says to each.
"use strict";
const { answered, follow } = require("./llama_cpp.js");

follow(async (job) => {
  const found = [];
  for (const question of job.questions) found.push(await answered(job, question));
  return found;
});
