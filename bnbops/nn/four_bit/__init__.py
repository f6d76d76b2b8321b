"""Weights of 4 bits: their scales, the parameter and the module that hold them."""
