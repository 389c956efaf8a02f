"""Attention among equal positions of all patches of a feature map (MobileViT)."""
