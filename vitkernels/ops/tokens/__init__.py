"""What packed tokens need before and after the transformer: position embeddings and pooling (NaViT)."""
