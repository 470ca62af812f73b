"""Training images with captions: drawn by a source, rendered, or a user's own."""
