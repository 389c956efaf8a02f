"""Chains of layers of a convolutional network in one call, for inference."""
