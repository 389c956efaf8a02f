"""Pre-norm transformer blocks, one call for all of them."""
