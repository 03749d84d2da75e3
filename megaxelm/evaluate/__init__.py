"""Bits per byte and perplexity by language: seed, dense, own expert, mixtures, worst expert."""
