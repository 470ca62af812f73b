"""Model repositories for Triton Inference Server: written from a bundle, and checked without a server."""
