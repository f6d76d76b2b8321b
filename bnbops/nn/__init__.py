"""Layers with bitsandbytes' names and arguments."""

from bnbops.nn import averaging as averaging
from bnbops.nn.embedding import Embedding, StableEmbedding
from bnbops.nn.embedding_4bit import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from bnbops.nn.embedding_8bit import Embedding8bit
from bnbops.nn.linear_4bit import Linear4bit, LinearFP4, LinearNF4
from bnbops.nn.linear_8bit import Int8Params, Linear8bitLt
from bnbops.nn.params_4bit import Params4bit
from bnbops.nn.plain_state import plain_state_dict
from bnbops.nn.quantize import quantize_
from bnbops.nn.quantize_plan import QuantizationPlan, quantization_plan

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "QuantizationPlan",
    "StableEmbedding",
    "plain_state_dict",
    "quantization_plan",
    "quantize_",
]
