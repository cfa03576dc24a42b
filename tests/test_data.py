"""The data module: protocols, loaders on several processes, files and their failures."""

from __future__ import annotations

import gzip
import hashlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from lightning_genmodels.data import BinarizedMNISTDataModule, InMemoryLoader, sources
from lightning_genmodels.data.sources import DataFile
from lightning_genmodels.errors import DataError, OptionError


def numbered(count: int) -> torch.Tensor:
    """Images that carry their index, so that one can see which came."""
    return torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 1, 2, 2).contiguous()


def seen(loader: InMemoryLoader) -> list[list[int]]:
    return [batch[:, 0, 0, 0].int().tolist() for batch in loader]


# Loaders.


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [7, 50, 101])
def test_evaluation_sees_every_image_once_in_equal_numbers_of_batches(count: int, world: int) -> None:
    loaders = [InMemoryLoader(numbered(count), 10, rank=rank, world_size=world) for rank in range(world)]
    batches = [seen(loader) for loader in loaders]
    assert len({len(b) for b in batches}) == 1
    assert all(batch for b in batches for batch in b)
    assert sorted(i for b in batches for batch in b for i in batch) == list(range(count))
    for rank, b in enumerate(batches):
        assert [i for batch in b for i in batch] == list(range(rank, count, world))


@pytest.mark.parametrize("world", [2, 5])
def test_training_splits_the_same_global_batches(world: int) -> None:
    alone = seen(InMemoryLoader(numbered(103), 10, train=True, seed=4))
    assert len(alone) == 10
    shares = [
        seen(InMemoryLoader(numbered(103), 10, train=True, seed=4, rank=rank, world_size=world))
        for rank in range(world)
    ]
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(i for share in shares for i in share[step])
        assert [len(share[step]) for share in shares] == [10 // world] * world


def test_dynamic_binarization_is_the_same_on_one_and_two_processes_and_fresh_each_epoch() -> None:
    grey = torch.full((40, 1, 4, 4), 100, dtype=torch.uint8)
    alone = InMemoryLoader(grey, 10, train=True, binarize=True, seed=1)
    halves = [InMemoryLoader(grey, 10, train=True, binarize=True, seed=1, rank=r, world_size=2) for r in (0, 1)]
    first = list(alone)
    for whole, even, odd in zip(first, *halves, strict=True):
        assert torch.equal(whole[0::2], even)
        assert torch.equal(whole[1::2], odd)
    alone.set_epoch(1)
    assert not torch.equal(torch.cat(first), torch.cat(list(alone)))


def test_dynamic_binarization_has_the_grey_value_as_its_mean() -> None:
    grey = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8).view(1, 1, 1, 5).expand(20_000, 1, 1, 5)
    bits = torch.cat(list(InMemoryLoader(grey.contiguous(), 1000, train=True, binarize=True)))
    assert bool(((bits == 0) | (bits == 1)).all())
    mean = bits.mean(0).flatten()
    assert mean[0] == 0
    assert mean[4] == 1
    expected = torch.tensor([1, 128, 254]) / 255
    assert torch.allclose(mean[1:4], expected, atol=5 * 0.5 / 20_000**0.5)


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resumed_loader_goes_on_with_the_next_batch(stop: int) -> None:
    def loader() -> InMemoryLoader:
        made = InMemoryLoader(numbered(100), 10, train=True, seed=2)
        made.set_epoch(3)
        return made

    whole = seen(loader())
    broken = loader()
    batches = iter(broken)
    head = [next(batches)[:, 0, 0, 0].int().tolist() for _ in range(stop)]
    fresh = InMemoryLoader(numbered(100), 10, train=True, seed=2)
    fresh.load_state_dict(broken.state_dict())
    fresh.set_epoch(3)
    assert head + seen(fresh) == whole


def test_epochs_are_shuffled_differently_and_reproducibly() -> None:
    loader = InMemoryLoader(numbered(100), 10, train=True, seed=0)
    first = seen(loader)
    loader.set_epoch(1)
    second = seen(loader)
    assert first != second
    loader.set_epoch(0)
    assert seen(loader) == first
    assert seen(InMemoryLoader(numbered(100), 10, train=True, seed=1)) != first


@pytest.mark.parametrize(("batch_size", "world_size"), [(12, 3), (100, 8), (5, 5)])
def test_means_over_the_shares_of_processes_weigh_up_to_that_of_the_batch(batch_size: int, world_size: int) -> None:
    loaders = [
        InMemoryLoader(numbered(200), batch_size, train=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    (whole, *_) = InMemoryLoader(numbered(200), batch_size, train=True)
    shares = [next(iter(loader)) for loader in loaders]
    assert sorted(torch.cat(shares).flatten(1)[:, 0].tolist()) == sorted(whole.flatten(1)[:, 0].tolist())
    mean = sum(loader.weight * share.mean() for loader, share in zip(loaders, shares, strict=True)) / world_size
    assert float(mean) == pytest.approx(float(whole.mean()))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(OptionError, match=r"batch_size 2 gives not every one of 3 processes an image"):
        InMemoryLoader(numbered(200), 2, train=True, world_size=3)
    with pytest.raises(OptionError, match="larger than the 50 training images"):
        InMemoryLoader(numbered(50), 100, train=True)
    with pytest.raises(OptionError, match="at least one"):
        InMemoryLoader(numbered(2), 100, world_size=3)


# Protocols.


@pytest.mark.parametrize("binarization", ["static", "dynamic", "threshold"])
def test_digits_need_no_network(binarization: str, tmp_path: Path) -> None:
    data = BinarizedMNISTDataModule(str(tmp_path / "none"), source="digits", binarization=binarization)
    data.prepare_data()
    data.setup()
    assert not (tmp_path / "none").exists()
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [1297, 250, 250]
    for split in ("train", "val", "test"):
        assert data.images(split).unique().tolist() == [0, 1]
        assert torch.equal(data.images(split), data.images(split))
        assert data.labels(split).unique().tolist() == list(range(10))
    first, second = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert first.shape == (100, 1, 28, 28)
    assert first.dtype == second.dtype == torch.float32


def test_dynamic_training_draws_anew_and_evaluation_does_not() -> None:
    data = BinarizedMNISTDataModule(source="digits", binarization="dynamic")
    loader = data.train_dataloader()
    first = torch.cat(list(loader)).mean(0)
    loader.set_epoch(1)
    assert not torch.equal(first, torch.cat(list(loader)).mean(0))
    again = BinarizedMNISTDataModule(source="digits", binarization="dynamic", seed=5)
    assert torch.equal(data.images("val"), again.images("val"))


@pytest.mark.parametrize("binarization", ["static", "threshold"])
@pytest.mark.parametrize("size", [4, 7, 14])
def test_small_images_stay_binary(size: int, binarization: str) -> None:
    data = BinarizedMNISTDataModule(source="digits", binarization=binarization, image_size=size)
    assert data.event_shape == (1, size, size)
    assert data.images("test").shape == (250, 1, size, size)
    assert data.images("test").unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "cifar"}, "expected source to be 'mnist' or 'digits', got 'cifar'"),
        ({"binarization": "none"}, "expected binarization to be 'static' or 'dynamic' or 'threshold', got 'none'"),
        ({"image_size": 29}, "expected image_size to be from 1 to below 29, got 29"),
        ({"batch_size": 0}, "expected batch_size to be a whole number of at least 1, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BinarizedMNISTDataModule(**options)


@pytest.mark.data
def test_real_static_files(data_root: Path) -> None:
    data = BinarizedMNISTDataModule(str(data_root))
    data.prepare_data()
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [50_000, 10_000, 10_000]
    never_on = (data.images("train").sum(0, dtype=torch.int64) == 0).sum()
    assert never_on == 97
    with pytest.raises(OptionError, match="no labels"):
        data.labels("test")


@pytest.mark.data
def test_static_images_are_draws_of_grey_ones(data_root: Path) -> None:
    static = BinarizedMNISTDataModule(str(data_root)).images("train").double().mean(0)
    dynamic = BinarizedMNISTDataModule(str(data_root), binarization="dynamic").images("train").double().mean(0)
    assert (static - dynamic).abs().max() < 0.02


@pytest.mark.data
def test_labels_belong_to_their_images(data_root: Path) -> None:
    data = BinarizedMNISTDataModule(str(data_root), binarization="threshold")
    train, test = (data.images(split).flatten(1).float() for split in ("train", "test"))
    means = torch.stack([train[data.labels("train") == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(test, means).argmin(1)
    assert (nearest == data.labels("test")).float().mean() > 0.75


# Files.


def amat(count: int) -> bytes:
    return b"".join(b" ".join(b"%d" % ((i + j) % 2) for j in range(784)) + b"\n" for i in range(count))


def test_amat_and_idx_are_read() -> None:
    images = sources.read_amat(amat(3))
    assert images.shape == (3, 1, 28, 28)
    assert images.flatten(1)[:, :3].tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 2, 3))
    assert sources.read_idx(header + bytes(range(12))).tolist() == [
        [[[0, 1, 2], [3, 4, 5]]],
        [[[6, 7, 8], [9, 10, 11]]],
    ]
    assert sources.read_idx(bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([7, 8, 9])).tolist() == [7, 8, 9]


class Mirror:
    """A folder served over HTTP on this machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        handler = partial(_Quiet, directory=str(folder))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        if "cut" in self.path:  # promised in full, sent in part
            outputfile.write(source.read(100))  # type: ignore[attr-defined]
            return
        if "slow" in self.path:
            for _ in range(100):
                outputfile.write(source.read(1))  # type: ignore[attr-defined]
                time.sleep(0.05)
            return
        super().copyfile(source, outputfile)  # type: ignore[arg-type]


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    made = Mirror(tmp_path / "mirror")
    yield made
    made.server.shutdown()


def data_file(content: bytes, *mirrors: str, suffix: str = "", name: str = "numbers") -> DataFile:
    return DataFile(f"set/{name}", hashlib.sha256(content).hexdigest(), len(content), mirrors, suffix)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_download_falls_back_to_the_next_mirror(mirror: Mirror, tmp_path: Path, suffix: str) -> None:
    content = b"0 1 0\n" * 1000
    (mirror.folder / f"numbers{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    file = data_file(content, "http://127.0.0.1:9/", mirror.address + "gone/", mirror.address, suffix=suffix)
    root = tmp_path / "data"
    assert sources.fetch(root, file) == root / f"set/numbers{suffix}"
    assert sources.read(root, file) == content
    assert files_in(root) == [f"numbers{suffix}"]
    mirror.server.shutdown()
    assert sources.fetch(root, file).exists()  # and is not fetched again


def test_corrupt_download_leaves_nothing(mirror: Mirror, tmp_path: Path) -> None:
    (mirror.folder / "numbers").write_bytes(b"not what was promised")
    with pytest.raises(DataError, match=r"expected sha256 .* found"):
        sources.fetch(tmp_path / "data", data_file(b"content", mirror.address))
    assert files_in(tmp_path / "data") == []


def test_download_cut_in_the_middle_leaves_nothing(mirror: Mirror, tmp_path: Path) -> None:
    content = b"x" * 100_000
    (mirror.folder / "cut").write_bytes(content)
    with pytest.raises(DataError, match="could not be downloaded"):
        sources.fetch(tmp_path / "data", data_file(content, mirror.address, name="cut"))
    assert files_in(tmp_path / "data") == []


def test_a_download_is_bounded_in_size_and_time_and_the_next_mirror_is_tried(mirror: Mirror, tmp_path: Path) -> None:
    content = b"0 1 0\n" * 1000
    for folder, wrong in (("endless", bytes(10**7)), ("bomb", gzip.compress(bytes(10**8)))):
        (mirror.folder / folder).mkdir()
        (mirror.folder / folder / "numbers.gz").write_bytes(wrong)
    (mirror.folder / "numbers.gz").write_bytes(gzip.compress(content))
    addresses = [f"{mirror.address}{folder}/" for folder in ("endless", "bomb")]
    with pytest.raises(DataError) as caught:
        sources.fetch(tmp_path / "none", data_file(content, *addresses, suffix=".gz"))
    assert "more than the" in str(caught.value)
    file = data_file(content, *addresses, mirror.address, suffix=".gz")
    assert sources.fetch(tmp_path / "data", file).is_file()
    assert sources.read(tmp_path / "data", file) == content
    (mirror.folder / "slow").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"not complete after 0\.2 seconds"):
        sources.fetch(tmp_path / "slow", data_file(bytes(100), mirror.address, name="slow"), limit=0.2)
    assert files_in(tmp_path / "slow") == []


@pytest.mark.parametrize(("kept", "suffix"), [("numbers", ""), ("numbers", ".gz"), ("numbers.gz", "")])
def test_a_damaged_file_is_fetched_again(mirror: Mirror, tmp_path: Path, kept: str, suffix: str) -> None:
    content = b"0 1 0\n" * 1000
    (mirror.folder / f"numbers{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    (tmp_path / "data" / "set").mkdir(parents=True)
    (tmp_path / "data" / "set" / kept).write_bytes(b"damaged")
    file = data_file(content, mirror.address, suffix=suffix)
    sources.fetch(tmp_path / "data", file)
    assert sources.read(tmp_path / "data", file) == content
    assert files_in(tmp_path / "data") == [f"numbers{suffix}"]


def test_a_damaged_file_without_a_network_is_one_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "numbers").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"is corrupt: expected sha256[\s\S]*127\.0\.0\.1:9"):
        sources.fetch(tmp_path, data_file(b"content", "http://127.0.0.1:9/"))
    assert files_in(tmp_path) == ["numbers"]


def test_no_network_and_no_files_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BINARIZED", ())
    broken = {s: data_file(b"", "http://127.0.0.1:9/", name=f"{s}.amat") for s in ("train", "val", "test")}
    monkeypatch.setattr(sources, "STATIC_FILES", broken)
    with pytest.raises(DataError) as caught:
        BinarizedMNISTDataModule(str(tmp_path / "data")).prepare_data()
    message = str(caught.value)
    for part in ("set/train.amat", str(tmp_path / "data"), "127.0.0.1:9", "--data.source digits", "--data.root"):
        assert part in message


def test_unprepared_data_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not in the data folder .* --data.root"):
        BinarizedMNISTDataModule(str(tmp_path)).setup()


def test_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write to the data folder"):
        sources.fetch(tmp_path / "file" / "data", data_file(b"", "http://127.0.0.1:9/"))


@pytest.mark.parametrize(
    ("content", "message"),
    ids=["cut", "no gzip", "other bytes"],
    argvalues=[
        (gzip.compress(amat(2))[:-20], "no complete gzip file"),
        (b"no gzip at all", "no complete gzip file"),
        (gzip.compress(amat(2)), "is corrupt: expected sha256"),
    ],
)
def test_damaged_local_file_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / (sources.STATIC_FILES["train"].path + ".gz")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        BinarizedMNISTDataModule(str(tmp_path)).setup()
    assert str(path) in str(caught.value)
    assert "delete it" in str(caught.value)


def test_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.ROOT_VARIABLE, str(tmp_path))
    assert BinarizedMNISTDataModule().root == tmp_path
    monkeypatch.delenv(sources.ROOT_VARIABLE)
    assert BinarizedMNISTDataModule().root == Path.home() / ".cache" / "lightning_genmodels" / "data"
