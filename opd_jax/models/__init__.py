"""One decoder for Llama, Qwen2 and Qwen3 checkpoints; weights in and out."""

from opd_jax.models._adapters import load_lora as load_lora
from opd_jax.models._adapters import save_lora as save_lora
from opd_jax.models._config import DecoderConfig as DecoderConfig
from opd_jax.models._config import RopeScaling as RopeScaling
from opd_jax.models._decoder import Decoder as Decoder
from opd_jax.models._decoder import KVCache as KVCache
from opd_jax.models._load import abstract as abstract
from opd_jax.models._load import load as load
from opd_jax.models._load import load_config as load_config
from opd_jax.models._load import resolve as resolve
from opd_jax.models._lora import LoRAParam as LoRAParam
from opd_jax.models._lora import add_lora as add_lora
from opd_jax.models._lora import merge_lora as merge_lora
from opd_jax.models._protocol import LanguageModel as LanguageModel
from opd_jax.models._save import save as save
from opd_jax.models._tokenizer import load_tokenizer as load_tokenizer
from opd_jax.models._tokenizer import stop_token_ids as stop_token_ids
