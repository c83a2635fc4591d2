"""A look at a set before training on it: what its pictures, captions and sizes are, as figures and
as a page."""
