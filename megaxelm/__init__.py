"""MegaXELM: train Cross-lingual Expert Language Models (X-ELM, arXiv 2401.10440) with DeepSpeed."""

from megaxelm.auto_classes import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
