"""One engine that answers: prompts, end tokens, caches, decoding, chat."""
