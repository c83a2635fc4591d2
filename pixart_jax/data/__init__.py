"""Data: from images and captions in any source to training batches of one bucket each."""
