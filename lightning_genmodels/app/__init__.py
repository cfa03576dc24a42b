"""The app: trained models in a browser. ``genmodels app`` serves it."""
