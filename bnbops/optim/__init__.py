"""8-bit and 32-bit optimizers with bitsandbytes' names and arguments."""

from bnbops.optim.adam import Adam, Adam8bit, Adam32bit
from bnbops.optim.adamw import AdamW, AdamW8bit, AdamW32bit
from bnbops.optim.base import Optimizer

__all__ = ["Adam", "Adam8bit", "Adam32bit", "AdamW", "AdamW8bit", "AdamW32bit", "Optimizer"]
