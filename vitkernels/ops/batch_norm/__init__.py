"""Batch normalisation in training with the activation behind it, in one op."""
