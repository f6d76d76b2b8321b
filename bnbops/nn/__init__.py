"""Layers with bitsandbytes' names and arguments."""

from bnbops.nn import averaging as averaging
from bnbops.nn import former_names as former_names
from bnbops.nn.convert.plan import QuantizationPlan, quantization_plan
from bnbops.nn.convert.quantize import quantize_
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.int8.parameter import Int8Params
from bnbops.nn.kinds import plain_state_dict
from bnbops.nn.layers.embedding import Embedding, StableEmbedding
from bnbops.nn.layers.embedding_4bit import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from bnbops.nn.layers.embedding_8bit import Embedding8bit
from bnbops.nn.layers.linear_4bit import Linear4bit, LinearFP4, LinearNF4
from bnbops.nn.layers.linear_8bit import Linear8bitLt

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
