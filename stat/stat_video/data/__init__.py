"""From an annotation file to batches of clips: annotations, sampling, decoding, transforms."""
