"""Tokenisers and text encoders, shared by all families.

make_tokenizer(kind, captions, vocab_size)   `word` or `bpe`, trained from captions
make_encoder(name, config, tokenizer)        an untrained encoder
EncoderSpec(name, config, tokenizer)         the same as an argument of a stage
TextEncoder, TextFeatures, Overflow          the contract of every encoder
"""

from lineage.text.contract import Overflow, TextEncoder, TextFeatures
from lineage.text.encoders import ENCODERS, EncoderSpec, make_encoder
from lineage.text.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_json

__all__ = [
    "ENCODERS",
    "EncoderSpec",
    "Overflow",
    "TextEncoder",
    "TextFeatures",
    "Tokenizer",
    "make_encoder",
    "make_tokenizer",
    "tokenizer_from_json",
]
