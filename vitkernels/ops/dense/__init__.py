"""Attention of a batch: what ``F.scaled_dot_product_attention`` computes, and what it refuses."""
