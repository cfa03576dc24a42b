"""Training beyond Lightning: optimizers, callbacks, tracking."""
