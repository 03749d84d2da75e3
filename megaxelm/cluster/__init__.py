"""How the corpus is divided among experts: partitioners by language relatedness, by document similarity, by language."""
