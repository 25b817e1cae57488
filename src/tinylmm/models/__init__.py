"""The parts, the LMM made of them, tuning, adapters, and models on disk."""
