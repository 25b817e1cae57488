"""tinylmm: a declarative experiment runner for small large-multimodal models."""

__version__ = "0.1.0"
