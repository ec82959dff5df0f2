"""Text: documents, tokenizers, the corpus, trimmed vocabularies."""
