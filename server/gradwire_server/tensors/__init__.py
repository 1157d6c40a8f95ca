"""Tensors that travel apart from their request."""
