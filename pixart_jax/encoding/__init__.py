"""Images and captions become shards: latent posteriors and text states in ArrayRecord files."""
