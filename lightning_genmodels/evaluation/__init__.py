"""Measuring a trained model: likelihoods and bounds, sample quality, probes."""
