"""What operators compute, in plain torch: for the self-check and for the tests."""
