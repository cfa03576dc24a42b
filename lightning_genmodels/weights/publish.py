"""Publishing weights on the Hugging Face Hub: one repository per model, one tag per weight."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from lightning_genmodels.errors import OptionError, WeightsError
from lightning_genmodels.evaluation.report import METRICS, VALUES
from lightning_genmodels.weights.card import model_card
from lightning_genmodels.weights.files import upload_advice
from lightning_genmodels.weights.loading import load
from lightning_genmodels.weights.lookup import CONFIG, resolve
from lightning_genmodels.weights.names import list_models
from lightning_genmodels.weights.records import Weights, list_weights, registry

SAMPLES = "samples.png"

_NAMESPACE = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class Publication:
    """The files of one weight that are, or would be, published.

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

    The main branch holds the model's default weight, and every weight has a tag. All tags are checked before anything
    is sent. Publishing again what is there changes nothing; after a failure in the middle it goes on. A tag is never
    moved.

    Args:
        name: A weight (``vae.static_v1``), or a model for all of its weights.
        namespace: User or organization on the Hub.
        dry_run: Only say what would be uploaded.
        token: Access token; default: ``HF_TOKEN`` or the one that ``hf auth login`` stored.

    Raises:
        UnknownNameError: No weight of that name.
        WeightsError: The weights are damaged, have no figures, or the Hub refused; the message says the way out.
    """
    if not _NAMESPACE.fullmatch(str(namespace)):
        raise OptionError(f"expected the name of a user or an organization on the Hub, got {namespace!r}")
    names = [name] if name in list_weights() else list_weights(name) if name in list_models() else []
    if not names:
        resolve(name)  # says what there is
        raise WeightsError(f"{name} is no registered weight of a generative model, so it has no card; use push_to_hub")
    planned = [_plan(registry()[weight], f"{namespace}/{registry()[weight].model}") for weight in names]
    if dry_run:
        return planned
    api = HfApi(token=token)
    tagged = [_is_tagged(api, publication) for publication in planned]
    return [_upload(api, publication, done) for publication, done in zip(planned, tagged, strict=True)]


def _plan(weights: Weights, repo: str) -> Publication:
    folder = resolve(weights.name).path
    load(weights.name)  # never publish what does not load
    if not weights.metrics:
        raise WeightsError(f"{weights.name} has no {METRICS}; a card without figures is not published")
    files = {"README.md": model_card(weights, repo).encode()}
    for name in (CONFIG, weights.filename, METRICS, VALUES, SAMPLES):
        files[name] = (folder / name).read_bytes()
    return Publication(weights, repo, files)


def _is_tagged(api: HfApi, publication: Publication) -> bool:
    """Whether the weight is there already, under its tag.

    Raises:
        WeightsError: Another one is, or the Hub does not answer.
    """
    repo, tag, weights = publication.repo, publication.weights.revision, publication.weights
    for name, sha256 in ((weights.filename, weights.sha256), (CONFIG, weights.config_sha256)):
        with _failures_of(repo):
            content = _content_at(api, repo, tag, name)
        if content is None:
            return False
        if hashlib.sha256(content).hexdigest() != sha256:
            raise WeightsError(
                f"{repo} has another {name} under the tag {tag}, and tags are never moved; nothing was uploaded; "
                "retrained weights get a new version number"
            )
    return True


def _upload(api: HfApi, publication: Publication, is_tagged: bool) -> Publication:
    repo, tag, weights = publication.repo, publication.weights.revision, publication.weights
    with _failures_of(repo):
        api.create_repo(repo, exist_ok=True)
        if weights.default:
            _commit(api, publication, "main")
        if not is_tagged:
            branch = "main" if weights.default else f"upload-{tag}"
            if branch != "main":  # a tag needs a commit, and main is the default weight's
                api.create_branch(repo, branch=branch, exist_ok=True)
                _commit(api, publication, branch)
            api.create_tag(repo, tag=tag, revision=branch)
            if branch != "main":
                api.delete_branch(repo, branch=branch)
        commit = api.model_info(repo, revision=tag).sha
    return Publication(weights, repo, publication.files, commit)


def _commit(api: HfApi, publication: Publication, branch: str) -> None:
    """Brings a branch to the files of a publication, in at most one commit."""
    repo, files = publication.repo, publication.files
    changed = [name for name, content in files.items() if _content_at(api, repo, branch, name) != content]
    if changed:
        operations = [CommitOperationAdd(name, files[name]) for name in changed]
        message = f"Publish {publication.weights.name}"
        api.create_commit(repo, operations, commit_message=message, revision=branch)


@contextmanager
def _failures_of(repo: str) -> Iterator[None]:
    """Turns whatever the client and its HTTP library raise, the names of which change, into one error."""
    try:
        yield
    except Exception as error:
        raise WeightsError(f"publishing to {repo} failed: {upload_advice(error, repo)}") from error


def _content_at(api: HfApi, repo: str, revision: str | None, name: str) -> bytes | None:
    try:
        path = hf_hub_download(repo, name, revision=revision, token=api.token)
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return None
    return Path(path).read_bytes()
