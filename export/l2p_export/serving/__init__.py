"""Writes model repositories for Triton Inference Server from a bundle, and checks them without a server."""
