"""The data room: from pictures and captions, wherever they lie, to batches of one bucket each."""
