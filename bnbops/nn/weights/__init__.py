"""What weights of all kinds share that are held as codes and scales."""
