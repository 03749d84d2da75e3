"""One decoder for all families; `families/` maps Hugging Face names, `hub.py` loads and saves."""
