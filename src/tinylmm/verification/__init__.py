"""Proof, for one configuration, that every fast path trains what a plain reference trains."""
