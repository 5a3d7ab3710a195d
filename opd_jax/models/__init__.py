"""One decoder for Llama, Qwen2 and Qwen3 checkpoints; weights in and out."""

from ._config import DecoderConfig as DecoderConfig
from ._config import RopeScaling as RopeScaling
from ._decoder import Decoder as Decoder
from ._decoder import KVCache as KVCache
from ._load import abstract as abstract
from ._load import load as load
from ._load import load_config as load_config
from ._load import resolve as resolve
from ._save import save as save
from ._tokenizer import load_tokenizer as load_tokenizer
from ._tokenizer import stop_token_ids as stop_token_ids
