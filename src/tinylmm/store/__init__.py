"""Finished stages by digest, whole and proven or not there; claims, runs, garbage. No torch."""
