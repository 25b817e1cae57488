"""An OpenAI-compatible server in front of the generation engine: requests, limits, answers."""
