"""The fused layer inside the video and image transformers of other libraries."""
