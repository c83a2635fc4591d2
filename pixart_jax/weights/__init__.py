"""Reading and writing parameters: one table of names a model and a format, and component folders
that diffusers and transformers open."""
