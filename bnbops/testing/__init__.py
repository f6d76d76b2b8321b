"""Every operator against plain torch, on any machine: sample calls and a check of what they do."""
