"""Tiny random models and tokenizers for the tests with Hugging Face's libraries; nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 96
ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'()-\n"


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> LlamaForCausalLM:
    """Two layers, 64 wide; grouped-query attention, an untied head."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=VOCABULARY, **_TOKENS, **sizes | heads | options)
    return _spread(LlamaForCausalLM(config)).to(dtype).eval()


def tiny_gpt2(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> GPT2LMHeadModel:
    """Two layers of `Conv1D`, whose weights are transposed; the head is tied to the embedding."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=VOCABULARY, **_TOKENS, **sizes | options)
    return _spread(GPT2LMHeadModel(config)).to(dtype).eval()


def tiny_mixtral(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> MixtralForCausalLM:
    """Two layers of four experts, each layer's in one 3-D parameter."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = MixtralConfig(vocab_size=VOCABULARY, **_TOKENS, **sizes | heads | options)
    return _spread(MixtralForCausalLM(config)).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *ALPHABET]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def saved(model: nn.Module, folder: Path) -> Path:
    """The model's folder, for `from_pretrained`."""
    model.save_pretrained(folder)
    return folder


def token_batch(rows: int = 2, columns: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 1, size: float = 0.05) -> nn.Module:
    """Moves what trains by random amounts: new adapters do nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@torch.no_grad()
def _spread(model: nn.Module) -> nn.Module:
    """Weights of the size that training gives: with the initial ones all logits are nearly alike."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model
