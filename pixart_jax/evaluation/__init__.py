"""Scores of a model: its generated images are compared, by rule, with their prompts."""
