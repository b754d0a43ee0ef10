"""Tokenizers."""

from miles.utils.processing_utils import load_processor as load_processor
from miles.utils.processing_utils import load_tokenizer as load_tokenizer
