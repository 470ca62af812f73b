"""Tensors in files: headers, chunked reading, quantized layouts, streamed writing, digests."""
