"""Publishing weights on the Hugging Face Hub: one repository per model, one tag per weight."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from lightning_genmodels import pretrained
from lightning_genmodels.errors import WeightsError
from lightning_genmodels.evaluation import METRICS, VALUES
from lightning_genmodels.hub.card import model_card
from lightning_genmodels.weights import Weights, list_weights, registry

SAMPLES = "samples.png"


@dataclass(frozen=True)
class Publication:
    """What is, or would be, published of one weight.

    Attributes:
        weights: The weight.
        repo: ``owner/repo``.
        files: Name and content of each file.
        commit: The commit that holds them, once they are published.
    """

    weights: Weights
    repo: str
    files: dict[str, bytes]
    commit: str | None = None

    def __str__(self) -> str:
        what = f"published as {self.commit}" if self.commit else "dry run, nothing was sent"
        lines = [f"{self.weights.name} -> {self.repo}, tag {self.weights.revision}: {what}"]
        return "\n".join([*lines, *(f"  {len(content):>10,} bytes  {name}" for name, content in self.files.items())])


def publish(name: str, namespace: str, *, dry_run: bool = True, token: str | None = None) -> list[Publication]:
    """Uploads a weight that ships with the package, or all of a model's, with a generated card.

    Publishing again what is there changes nothing; after a failure in the middle it goes on. A tag is never moved.

    Args:
        name: A weight (``vae.static_v1``), or a model, whose default weight then ends up on the main branch.
        namespace: User or organization on the Hub.
        dry_run: Only say what would be uploaded.
        token: Access token; default: ``HF_TOKEN`` or the one that ``hf auth login`` stored.

    Raises:
        UnknownNameError: No weight of that name.
        WeightsError: The weights are damaged, have no figures, or the Hub refused; the message says the way out.
    """
    names = [name] if name in list_weights() else sorted(list_weights(name), key=lambda n: registry()[n].default)
    if not names:
        pretrained.resolve(name)  # says what there is
        raise WeightsError(f"{name} is no registered weight of a generative model, so it has no card; use push_to_hub")
    planned = [_plan(registry()[weight], f"{namespace}/{registry()[weight].model}") for weight in names]
    if dry_run:
        return planned
    api = HfApi(token=token)
    return [_upload(api, publication) for publication in planned]


def _plan(weights: Weights, repo: str) -> Publication:
    folder = pretrained.resolve(weights.name).path
    pretrained.read(weights.name)  # never publish what does not load
    if not weights.metrics:
        raise WeightsError(f"{weights.name} has no {METRICS}; a card without figures is not published")
    files = {"README.md": model_card(weights, repo).encode()}
    for name in (pretrained.CONFIG, weights.filename, METRICS, VALUES, SAMPLES):
        files[name] = (folder / name).read_bytes()
    return Publication(weights, repo, files)


def _upload(api: HfApi, publication: Publication) -> Publication:
    repo, tag = publication.repo, publication.weights.revision
    try:
        api.create_repo(repo, exist_ok=True)
        tagged = _content_at(api, repo, tag, publication.weights.filename)
        if tagged is not None and hashlib.sha256(tagged).hexdigest() != publication.weights.sha256:
            raise WeightsError(
                f"{repo} has other weights under the tag {tag}, and tags are never moved; retrained weights get a new "
                "version number"
            )
        operations = [
            CommitOperationAdd(name, content)
            for name, content in publication.files.items()
            if _content_at(api, repo, None, name) != content
        ]
        if operations:
            api.create_commit(repo, operations, commit_message=f"Publish {publication.weights.name}")
        if tagged is None:
            api.create_tag(repo, tag=tag)
        commit = api.model_info(repo, revision=tag).sha
    except WeightsError:
        raise
    except Exception as error:  # whatever the client and its HTTP library raise, the names of which change
        raise WeightsError(f"publishing to {repo} failed: {pretrained.upload_advice(error, repo)}") from error
    return Publication(publication.weights, repo, publication.files, commit)


def _content_at(api: HfApi, repo: str, revision: str | None, name: str) -> bytes | None:
    try:
        path = hf_hub_download(repo, name, revision=revision, token=api.token)
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return None
    return Path(path).read_bytes()
