"""The training data of the bundled model: the world, the abilities, the corpus."""
