"""Real text as tokens, split into training and validation, with batches that are a pure function of seed and step."""

import hashlib
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HOLD_OUT = 10  # every tenth file is held out, or the last tenth of the text where there are fewer files
PIECES = re.compile(rb" ?[A-Za-z]+|\s+|.")  # a word with the space before it, white space, anything else


class Vocabulary:
    """The 256 bytes, then the text's commonest words; rarer ones are spelt in bytes, so nothing is unknown."""

    def __init__(self, text: bytes, size: int) -> None:
        counts = Counter(piece for piece in PIECES.findall(text) if len(piece) > 1)
        commonest = sorted(counts, key=lambda piece: (-counts[piece], piece))[: max(0, size - 256)]
        self.pieces = [bytes([value]) for value in range(256)] + commonest
        self._index = {piece: index for index, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: bytes) -> Tensor:
        """The tokens of the text, int64 [tokens]."""
        tokens: list[int] = []
        for piece in PIECES.findall(text):
            index = self._index.get(piece)
            tokens.extend(piece if index is None else (index,))
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text; bytes that are not UTF-8, or would upset a terminal, show as replacement characters."""
        text = b"".join(self.pieces[token] for token in tokens.tolist()).decode(errors="replace")
        return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


@dataclass(frozen=True)
class Text:
    """The tokens of both splits, int64 [tokens] each, and a name for the exact bytes that they came from."""

    vocabulary: Vocabulary
    train: Tensor
    validation: Tensor
    digest: str

    def batch(self, split: str, seed: int, step: int, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [batch_size, block_size] each; the targets are the inputs one token later."""
        tokens: Tensor = getattr(self, split)
        starts = random.Random(f"{split}/{seed}/{step}").choices(range(len(tokens) - block_size), k=batch_size)
        windows = torch.stack([tokens[start : start + block_size + 1] for start in starts])
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def load_text(source: Path | None, vocabulary_size: int, block_size: int) -> Text:
    """Reads a file, a folder's UTF-8 files, or the Python standard library's top-level modules (None).

    Raises ValueError where there is nothing to read or too little for one window in each split.
    """
    return as_text(read_documents(source), vocabulary_size, block_size, str(source))


def as_text(documents: Sequence[bytes], vocabulary: int | Vocabulary, block_size: int, name: str) -> Text:
    """As `load_text`, from documents that errors call by the name, with a vocabulary of this size or this very one."""
    train, validation = _split(list(documents))
    if isinstance(vocabulary, int):
        vocabulary = Vocabulary(train, vocabulary)
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()[:16]
    text = Text(vocabulary, vocabulary.encode(train), vocabulary.encode(validation), digest)
    if min(len(text.train), len(text.validation)) <= block_size:
        raise ValueError(
            f"too little text in {name}: {len(text.train)} tokens to train on and {len(text.validation)} to validate "
            f"on, but each must exceed the block size of {block_size}"
        )
    return text


def language_reference() -> list[str]:
    """English prose that every Python brings along: the topics of its reference that help() shows."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def read_documents(source: Path | None) -> list[bytes]:
    """The documents, in an order that depends on nothing but their relative paths."""
    if source is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = list(root.glob("*.py"))
    elif source.is_dir():
        root, paths = source, [path for path in source.rglob("*") if path.is_file()]
    elif source.is_file():
        return [source.read_bytes()]
    else:
        raise ValueError(f"no such file or folder: {source}")
    documents = [path.read_bytes() for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix())]
    return [document for document in documents if _is_text(document)]


def _is_text(document: bytes) -> bool:
    try:
        document.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in document


def _split(documents: list[bytes]) -> tuple[bytes, bytes]:
    if len(documents) < HOLD_OUT:
        text = b"\n".join(documents)
        cut = len(text) - len(text) // HOLD_OUT
        return text[:cut], text[cut:]
    held_out = documents[HOLD_OUT - 1 :: HOLD_OUT]
    del documents[HOLD_OUT - 1 :: HOLD_OUT]
    return b"\n".join(documents), b"\n".join(held_out)
