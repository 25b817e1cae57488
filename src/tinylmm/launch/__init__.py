"""Runs a plan: which stage next, on which backend, and the ranks' entry point."""
