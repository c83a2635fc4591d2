"""The labelling room: what is said of pictures, and pictures and words turned into the shards that
training reads."""
