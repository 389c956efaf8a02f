"""The projection of an image's patches, for inference."""
