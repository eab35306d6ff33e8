"""Codecs, which turn pictures into discrete codes, and the transformer that models the codes."""
