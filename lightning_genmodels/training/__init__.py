"""What a recipe has beyond Lightning: optimizers, callbacks, tracking."""
