"""Weights of 8 bits (LLM.int8): the parameter and the module that hold them."""
