"""MegaXELM: train Cross-lingual Expert Language Models (X-ELM, arXiv 2401.10440) with DeepSpeed."""

__version__ = "0.1.0"
