"""Re-Attention of DeepViT: attention maps mixed across heads."""
