"""The configuration tree as package data: Hydra reads it as `pkg://tinylmm.conf`, from a checkout and from a wheel."""
