"""Captions of images by vision-language models, their nouns, and a page that shows a data set."""
