"""Reference model of DeepSeek-V3 on the library's ops: load, prefill, decode, speculate, train."""

from . import generate, mtp, train
from .config import Config
from .generate import ByteTokenizer, load_tokenizer
from .model import DeepSeekV3, PagedLatentCache
from .stage import Stage, stages
from .trainer import NonFiniteError, Options, Trainer

__all__ = [
    "ByteTokenizer",
    "Config",
    "DeepSeekV3",
    "NonFiniteError",
    "Options",
    "PagedLatentCache",
    "Stage",
    "Trainer",
    "generate",
    "load_tokenizer",
    "mtp",
    "stages",
    "train",
]
