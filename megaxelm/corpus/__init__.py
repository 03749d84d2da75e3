"""From text to batches: readers, held-out split, tokenizer, token index, sampling and packing."""
