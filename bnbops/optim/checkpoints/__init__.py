"""State dicts: loading, and exchange with bitsandbytes and torch.optim."""
