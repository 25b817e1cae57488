"""The graph of a run, what decides each stage, and what would run. No torch."""
