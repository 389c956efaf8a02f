"""Inverted bottlenecks and transformer MLPs in one pass, for inference."""
