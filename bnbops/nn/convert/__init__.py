"""`quantize_`: what becomes of a float model's weights, and where they come from."""
