"""How alike attention maps are: the collapse metric of DeepViT."""
