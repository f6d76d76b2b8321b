"""8-bit, 32-bit and paged optimizers with bitsandbytes' names and arguments."""

from bnbops.optim.core.manager import GlobalOptimManager
from bnbops.optim.core.optimizer import Optimizer

# Modules of bitsandbytes.optim.
from bnbops.optim.families import adagrad, adam, adamw, ademamix, lamb, lars, lion, rmsprop, sgd  # noqa: F401
from bnbops.optim.families.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from bnbops.optim.families.adam import Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit
from bnbops.optim.families.adamw import AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from bnbops.optim.families.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from bnbops.optim.families.lamb import LAMB, LAMB8bit, LAMB32bit
from bnbops.optim.families.lars import LARS, LARS8bit, LARS32bit, PytorchLARS
from bnbops.optim.families.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from bnbops.optim.families.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
from bnbops.optim.families.sgd import SGD, SGD8bit, SGD32bit
from bnbops.optim.families.signum import Signum, Signum8bit, Signum32bit

__all__ = [
    "LAMB", "LARS", "SGD", "AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "Adagrad", "Adagrad8bit", "Adagrad32bit",
    "Adam", "Adam8bit", "Adam32bit", "AdamW", "AdamW8bit", "AdamW32bit", "GlobalOptimManager", "LAMB8bit", "LAMB32bit",
    "LARS8bit", "LARS32bit", "Lion", "Lion8bit", "Lion32bit", "Optimizer", "PagedAdEMAMix", "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit", "PagedAdamW", "PagedAdamW8bit",
    "PagedAdamW32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit", "PytorchLARS", "RMSprop", "RMSprop8bit",
    "RMSprop32bit", "SGD8bit", "SGD32bit", "Signum", "Signum8bit", "Signum32bit",
]  # fmt: skip
