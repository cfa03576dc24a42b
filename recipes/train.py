"""Trains, validates or tests a model: the same entry point as the command ``genmodels``.

python recipes/train.py fit --config recipes/vae.yaml --data.root /path/to/data
"""

from lightning_genmodels.cli import main

if __name__ == "__main__":
    main()
