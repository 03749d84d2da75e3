"""How the corpus is divided among experts: by the relatedness of languages, the similarity of documents, a list of languages, or chance."""
