"""What all optimizers share: the step from gradients to operator calls, states, and options of single parameters."""
