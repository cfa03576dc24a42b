"""``python -m lightning_genmodels.cli`` is ``genmodels``."""

from lightning_genmodels.cli import main

if __name__ == "__main__":
    main()
