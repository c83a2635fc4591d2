"""Says how good a model's pictures are: what is drawn is compared, by rule, with what was asked
for."""
