"""Trained weights: names, records, files, look-up, the Hub, cards, publishing, verifying."""
