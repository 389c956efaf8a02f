"""Cascaded group attention of EfficientViT."""
