"""Looks up the files behind a name: in a local folder, the package, the Hub's cache, the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_genmodels.errors import WeightsError, first_line
from lightning_genmodels.weights.names import list_models
from lightning_genmodels.weights.records import get_weights, registry

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where weights lie.

    Attributes:
        path: A folder, or a ``.ckpt`` file.
        sha256: What the registry says of the safetensors file, if it knows it.
        config_sha256: The same for the config.
    """

    path: Path
    sha256: str | None = None
    config_sha256: str | None = None


def resolve(name: str | Path, *, revision: str | None = None, also: Sequence[str] = ()) -> Source:
    """Finds the files behind a name: a local folder first, then the package, then the Hub's cache, then the Hub.

    A bare word that names a model or a weight means that, even where a folder has the same name: write ``./vae`` for
    the folder.

    Args:
        name: See :func:`lightning_genmodels.load`.
        revision: Branch, tag or commit, for a repository.
        also: More files than config and weights, to be fetched where there are any to fetch.

    Raises:
        WeightsError: No such path, the Hub did not give the files, or what is no repository has no revisions.
        UnknownNameError: A name that names nothing.
    """
    if not isinstance(name, str | Path):
        raise WeightsError(f"expected the name of a weight or a model, or a path, got {name!r}")
    source = _find(name, revision, also)
    if revision is not None and not _REPO_ID.fullmatch(str(name)):
        raise WeightsError(
            f"{name} is no repository on the Hub and has no revision {revision!r}; name the weight itself (`genmodels "
            "list` names all), or the repository: owner/repo"
        )
    return source


def _find(name: str | Path, revision: str | None, also: Sequence[str]) -> Source:
    text, path = str(name), Path(name).expanduser()
    is_name = not isinstance(name, Path) and (text in {*registry(), *list_models()})
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise WeightsError(f"no checkpoint at {path}")
        return Source(path)
    if path.name in (CONFIG, WEIGHTS) and path.is_file():
        return Source(path.parent)
    if path.is_dir() and not is_name:
        return Source(path)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise WeightsError(f"no folder of weights at {path}; it should hold {CONFIG} and {WEIGHTS}")
    if _REPO_ID.fullmatch(text):
        return Source(_download(text, revision, also))
    weights = get_weights(text)
    folder = weights.folder or _download(weights.repo, weights.revision, also)
    return Source(folder, weights.sha256, weights.config_sha256)


def _download(repo: str, revision: str | None, also: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(repo, CONFIG, revision=revision)).parent
        for file in (WEIGHTS, *also):  # of the commit that the config is of, even if the branch has moved since
            hf_hub_download(repo, file, revision=folder.name)
    except Exception as error:  # whatever the client and its HTTP library raise, the names of which change
        where = f"{repo} at revision {revision or 'main'}"
        raise WeightsError(
            f"cannot get the weights of {where} from the Hugging Face Hub: {type(error).__name__}: "
            f"{first_line(error)}; check the name and the network, or give a local folder"
        ) from error
    return folder
