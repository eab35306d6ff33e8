"""Discrete codes and the transformers that write pictures with them."""
