"""Bipartite matching of predictions to targets, and the loss on what was matched (DETR)."""
