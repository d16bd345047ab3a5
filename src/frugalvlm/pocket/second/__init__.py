"""The second generation of pocket scenes, questions and training: what the first one taught."""
