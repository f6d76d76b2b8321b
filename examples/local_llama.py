"""A small Llama with its tokenizer, trained here: the examples for Hugging Face's libraries download nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from text_data import HOLD_OUT, language_reference, read_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import trange
from training import lr_factor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bnbops.optim import AdamW8bit

END = "<|end|>"
VOCABULARY = 2048


def prose() -> list[str]:
    """Python's language reference, where the base has seen code."""
    return language_reference()


def documents(source: Path | None) -> list[str]:
    """A text file, a folder of them, or the Python standard library."""
    return [document.decode(errors="replace") for document in read_documents(source)]


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """The text as windows of so many tokens, int64 [windows, length]: to train on, and a tenth to validate."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(whole) < HOLD_OUT:
        raise ValueError(f"too little text: {len(ids)} tokens make {len(whole)} windows, needed are {HOLD_OUT}")
    held_out = torch.arange(len(whole)) % HOLD_OUT == HOLD_OUT - 1
    return whole[~held_out], whole[held_out]


def make_llama(folder: Path, width: int, layers: int, steps: int, seed: int = 0) -> Path:
    """Trains a Llama on the Python standard library's text and saves it, in bf16, with its tokenizer."""
    torch.manual_seed(seed)
    texts = documents(None)[::4]
    tokenizer = make_tokenizer(texts)
    train, _ = windows(tokenizer, texts, 128)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 64}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64 * (width * 11 // 256),
        num_hidden_layers=layers, max_position_embeddings=512, **heads, **ends,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = AdamW8bit(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    for _, batch in zip(trange(steps, desc="base", unit="step"), batches(train.to(model.device), 8), strict=False):
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Random rows, without end."""
    while True:
        yield rows[torch.randint(len(rows), (size,), device=rows.device)]
