"""Reference model of DeepSeek-V3 on the library's ops: load, prefill, decode, speculate, train."""

from . import generate, mtp, train
from .config import Config
from .generate import ByteTokenizer, load_tokenizer
from .model import DeepSeekV3, PagedLatentCache

__all__ = [
    "ByteTokenizer",
    "Config",
    "DeepSeekV3",
    "PagedLatentCache",
    "generate",
    "load_tokenizer",
    "mtp",
    "train",
]
