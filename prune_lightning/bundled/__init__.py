"""Everything that the bundled model knows and was trained on: the world, the abilities, the corpus."""
