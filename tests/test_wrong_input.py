"""Every wrong input gets one line that says what was expected, what came, and the way out."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lightning_genmodels as gm
from lightning_genmodels.base import ExplicitModel, GenerativeModel, LatentVariableModel, OrderMixture
from lightning_genmodels.cli import SUMMARIES, main
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.errors import ImageError, OptionError, UnknownNameError, WeightsError
from lightning_genmodels.models import GAN, MADE, NADE, VAE, EoNADE, PixelSNAIL

SOAK = bool(os.environ.get("GENMODELS_SOAK"))
COMMAND_LINES = 500 if SOAK else 60

SHAPE = (1, 2, 2)
WRONG_IMAGES: dict[str, Any] = {
    "None": None,
    "text": "x",
    "ragged lists": [[1, 2], [3]],
    "objects": [object()],
    "complex": torch.zeros(3, *SHAPE, dtype=torch.complex64),
    "sparse": torch.zeros(3, *SHAPE).to_sparse(),
    "infinite": torch.full((3, *SHAPE), float("inf")),
    "NaN": torch.full((3, *SHAPE), float("nan")),
    "grey": np.full((3, *SHAPE), 0.5),
    "no batch": torch.zeros(SHAPE),
    "another size": np.zeros((3, 1, 2, 3)),
}
WRONG_MASKS: dict[str, Any] = {
    "None": None,
    "text": "top",
    "NaN": torch.full((2, 2), float("nan")),
    "grey": np.full((2, 2), 0.5),
    "complex": torch.ones(2, 2, dtype=torch.complex64),
    "another size": torch.ones(3, 3),
}


def scorers() -> dict[str, Callable[[Any], Any]]:
    made, vae = MADE(SHAPE, hidden_sizes=(3,)), VAE(SHAPE, hidden_sizes=(3,), latent_dim=2)
    return {"log_prob": made.log_prob, "encode": vae.encode, "elbo": vae.elbo, "iw_bound": lambda x: vae.iw_bound(x, 2)}


def completers() -> dict[str, NADE | EoNADE | PixelSNAIL]:
    return {
        "nade": NADE(SHAPE, hidden_size=3),
        "eonade": EoNADE(SHAPE, hidden_sizes=(3,)),
        "pixelsnail": PixelSNAIL(SHAPE, channels=4, num_layers=1, heads=1, attention_every=1),
    }


@pytest.mark.parametrize("method", sorted(scorers()))
@pytest.mark.parametrize("kind", sorted(WRONG_IMAGES))
def test_what_is_no_batch_of_binary_images_is_refused(method: str, kind: str) -> None:
    with pytest.raises(ImageError, match="expected"):
        scorers()[method](WRONG_IMAGES[kind])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float64])
def test_arrays_and_lists_are_images(dtype: Any) -> None:
    images = np.array([[[[0, 1], [1, 1]]], [[[0, 0], [1, 0]]]], dtype=dtype)
    model = MADE(SHAPE, hidden_sizes=(3,))
    expected = model.log_prob(torch.tensor(images.tolist()))
    assert torch.equal(model.log_prob(images), expected)
    assert torch.equal(model.log_prob(images.tolist()), expected)


@pytest.mark.parametrize("name", sorted(completers()))
@pytest.mark.parametrize("kind", sorted(WRONG_MASKS))
def test_what_is_no_mask_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ImageError, match="mask"):
        completers()[name].complete(torch.zeros(2, *SHAPE), WRONG_MASKS[kind])


@pytest.mark.parametrize("name", sorted(completers()))
def test_a_mask_of_numbers_is_one_of_booleans(name: str) -> None:
    model, mask = completers()[name], torch.tensor([[True, True], [False, False]])
    x = torch.ones(5, *SHAPE)
    found = [
        model.complete(x, given, generator=torch.Generator().manual_seed(0))
        for given in (mask, mask.float(), mask.numpy(), mask.int().tolist())
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VAE(hidden_sizes=200), "hidden_sizes to be a list of values, each a whole number, got 200"),
        (lambda: VAE(hidden_sizes=["a"]), "hidden_sizes"),
        (lambda: VAE(hidden_sizes="200"), "hidden_sizes"),
        (lambda: VAE(28), "event_shape"),
        (lambda: VAE("a"), "event_shape"),
        (lambda: VAE(latent_dim=2.5), "latent_dim to be a whole number, got 2.5"),
        (lambda: VAE(latent_dim=True), "latent_dim to be a whole number, got True"),
        (lambda: VAE(network="cnn"), "network to be 'mlp' or 'conv', got 'cnn'"),
        (lambda: VAE(betas=3), "betas to be a list of 2 values, each a number, got 3"),
        (lambda: VAE(betas=(0.5,)), "betas"),
        (lambda: VAE(learning_rate="x"), "learning_rate to be a number, got 'x'"),
        (lambda: VAE(learning_rate=float("nan")), "learning_rate"),
        (lambda: VAE(schedule="linear"), "schedule to be 'cosine' or 'linear_fall', got 'linear'"),
        (lambda: NADE(hidden_size=None), "hidden_size to be a whole number, got None"),
        (lambda: NADE(order=3), "order to be text, got 3"),
        (lambda: PixelSNAIL(orders="patches"), "orders to be a list of values, each text, got 'patches'"),
        (lambda: MADE(hidden_sizes=5), "hidden_sizes"),
        (lambda: GAN(latent_dim="64"), "latent_dim"),
        (lambda: EoNADE(num_orders=None), "num_orders"),
        (lambda: BinarizedMNISTDataModule(3), "root"),
        (lambda: BinarizedMNISTDataModule(source="x"), "source to be 'mnist' or 'digits', got 'x'"),
        (lambda: BinarizedMNISTDataModule(batch_size=2.5), "batch_size"),
        (lambda: BinarizedMNISTDataModule(batch_size=0), "batch_size"),
        (lambda: BinarizedMNISTDataModule(seed=-1), "seed"),
        (lambda: BinarizedMNISTDataModule(image_size=29), "image_size"),
    ],
)
def test_a_constructor_names_the_argument_that_is_wrong(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(OptionError, match=r"^expected ") as caught:
        make()
    assert said in str(caught.value)


def test_the_annotation_of_the_class_itself_counts_not_that_of_its_base() -> None:
    class ByNumber(NADE):
        def __init__(self, event_shape: tuple[int, int, int] = (1, 2, 2), order: int = 0) -> None:
            super().__init__(event_shape, hidden_size=3, order="snake" if order == 1 else "raster")

    with pytest.raises(OptionError, match="expected order to be a whole number, got 'snake'"):
        ByNumber(order="snake")  # type: ignore[arg-type]
    assert torch.equal(ByNumber(order=1).pixel_order, torch.tensor([0, 1, 3, 2]))


@pytest.mark.parametrize("number", [2.0, "2", -1, True, None])
def test_numbers_of_samples_and_particles(number: Any) -> None:
    vae = VAE(SHAPE, hidden_sizes=(3,), latent_dim=2)
    with pytest.raises(OptionError, match="expected num_samples"):
        vae.sample(number)
    with pytest.raises(OptionError, match="expected num_particles"):
        vae.iw_bound(torch.zeros(1, *SHAPE), number)
    with pytest.raises(OptionError, match="expected num_particles"):
        vae.log_weights(torch.zeros(1, *SHAPE), number)
    for model in (vae, GAN(SHAPE, latent_dim=2, hidden_sizes=(3,))):
        with pytest.raises(OptionError, match="expected num_samples"):
            model.sample_latent(number)


WRONG_CODES: list[Any] = [None, "z", np.zeros((2, 2)), [[0.0, 0.0]], torch.zeros(2), torch.zeros(2, 3)]
WRONG_CODES.append(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("codes", WRONG_CODES, ids=repr)
def test_what_are_no_codes_is_refused(codes: Any) -> None:
    vae = VAE(SHAPE, hidden_sizes=(3,), latent_dim=2)
    gan = GAN(SHAPE, latent_dim=2, hidden_sizes=(3,))
    autoencoder = gm.Autoencoder(SHAPE, hidden_sizes=(3,), code_dim=2)
    for use in (vae.decode, gan.decode, autoencoder.decode, lambda z: vae.log_joint(torch.zeros(2, *SHAPE), z)):
        with pytest.raises(OptionError, match=r"expected codes as a floating-point tensor of shape \(\.\.\., 2\)"):
            use(codes)


def test_a_generator_is_one_of_pytorch() -> None:
    model: GenerativeModel
    for model in (VAE(SHAPE, hidden_sizes=(3,), latent_dim=2), MADE(SHAPE, hidden_sizes=(3,))):
        with pytest.raises(OptionError, match=r"expected a torch\.Generator, got 0; make one"):
            model.sample(2, generator=0)
        if isinstance(model, LatentVariableModel):
            with pytest.raises(OptionError, match=r"expected a torch\.Generator"):
                model.iw_bound(torch.zeros(1, *SHAPE), 2, generator=0)
        if isinstance(model, ExplicitModel) and isinstance(model, OrderMixture):
            with pytest.raises(OptionError, match=r"expected a torch\.Generator"):
                model.complete(torch.zeros(1, *SHAPE), torch.ones(2, 2), generator=0)


@pytest.mark.parametrize("name", [None, 3, b"vae", ["vae"]])
def test_a_name_is_text_or_a_path(name: Any) -> None:
    with pytest.raises(WeightsError, match="expected the name of a weight or a model, or a path"):
        gm.load(name)
    with pytest.raises(WeightsError, match="expected the name"):
        VAE.from_pretrained(name)


def test_only_a_repository_has_revisions(tmp_path: Path) -> None:
    VAE(SHAPE, hidden_sizes=(3,), latent_dim=2).save_pretrained(tmp_path)
    for name in ("vae", "vae.static_v1", str(tmp_path)):
        with pytest.raises(WeightsError, match="has no revision 'v9'"):
            gm.load(name, revision="v9")


def test_an_unknown_model_has_no_list_of_weights() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'vae'"):
        gm.list_weights("vea")


def test_a_new_model_from_torch_hub_has_no_weights() -> None:
    with pytest.raises(OptionError, match="expected pretrained=True"):
        hubconf().vae(pretrained=False, weights="vae.static_v1")


def test_completing_what_the_order_cannot_names_a_model_that_can() -> None:
    bottom = torch.tensor([[False, False], [True, True]])
    with pytest.warns(UserWarning, match="eonade"):
        completers()["nade"].complete(torch.zeros(1, *SHAPE), bottom)
    assert isinstance(completers()["eonade"], OrderMixture)
    completers()["eonade"].complete(torch.zeros(1, *SHAPE), bottom)  # warnings are errors


# The command line.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    Path("empty").write_bytes(b"")
    for name in ("empty.npy", "empty.png", "empty.ckpt", "empty.yaml"):
        Path(name).write_bytes(b"")
    Path("noise.ckpt").write_bytes(random.Random(0).randbytes(3000))
    Path("open.yaml").write_text("model: [")
    np.save("images.npy", np.zeros((2, 1, 28, 28), dtype=np.uint8))
    np.save("nan.npy", np.full((28, 28), np.nan))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("log_prob bernoulli empty.npy", "cannot read images from empty.npy"),
        ("log_prob bernoulli empty.png", "cannot read images from empty.png"),
        ("sample empty.ckpt", "empty.ckpt is no checkpoint of this package, or it is damaged"),
        ("sample noise.ckpt", "noise.ckpt is no checkpoint of this package, or it is damaged"),
        ("export noise.ckpt out", "noise.ckpt is no checkpoint"),
        ("export noise.ckpt file", "file is no folder you may write to"),
        ("sample bernoulli --out .", "expected an output that ends in .png or .npy, got ."),
        ("encode vae images.npy .", "expected an output that ends in .npy, got ."),
        ("evaluate bernoulli --data.source digits --out file", "file is no folder you may write to"),
        ("evaluate bernoulli --data.source digits --accelerator foo", "accelerator='foo'"),
        ("evaluate bernoulli --data.source digits --precision foo", "Precision 'foo' is invalid"),
        ("fit --model bernoulli --data.source digits --trainer.default_root_dir file", "no folder you may write to"),
        ("fit --model bernoulli --data.source digits --seed_everything 4294967296", "expected seed_everything"),
        ("fit --model bernoulli --data.source digits --seed_everything -1", "expected seed_everything"),
        ("fit --model bernoulli --data.source digits --ckpt_path noise.ckpt", "noise.ckpt is no checkpoint"),
        ("fit --config empty.yaml", "config"),
        ("fit --config open.yaml", "config"),
        ("fit", "required: fit.model"),
        ("verify nothing", "unknown model or weight 'nothing'"),
        ("publish bernoulli a/b", "expected the name of a user or an organization on the Hub, got 'a/b'"),
        ("complete nade images.npy --observed sideways", "sideways"),
        ("app --port 65536", "expected port to be from 0 to below 65536, got 65536"),
        ("app --host nowhere.invalid --port 0", "cannot listen at nowhere.invalid"),
        ("complete nade images.npy --observed nan.npy", "nan.npy: expected a mask of finite numbers"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    folder: Path, args: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as caught:
        main(args.split())
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("genmodels: error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow(reason="hundreds of commands")
@pytest.mark.filterwarnings("ignore")  # of what Lightning makes of the options
def test_random_command_lines_end_well_or_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands, options and values drawn at random, from those that there are and those that there are not."""
    draw = random.Random(0)
    words = [
        *(
            "bernoulli",
            "markov",
            "chain_rule_table",
            "vea",
            "",
            "images.npy",
            "empty.npy",
            "empty.ckpt",
            "file",
            ".",
            "..",
        ),
        *(
            "noise.ckpt",
            "out.npy",
            "out.png",
            "-1",
            "0",
            "1",
            "2",
            "1e400",
            "nan",
            "None",
            "[]",
            "{}",
            "[1, 2",
            "é",
            "\\",
        ),
        *("true", "top", "null", "a/b/c", "./", "~", "--", "=", "'", "*", "999999999999999999999999", "https://x"),
    ]
    options = [
        *("--out", "--num_samples", "--grid", "--seed", "--num_particles", "--limit", "--data.source", "--split"),
        *("--observed", "--steps", "--pairs", "--half", "--full", "--dry_run", "--as_json", "--config", "--model"),
        *("--data", "--trainer.max_epochs", "--trainer", "--ema", "--ckpt_path", "--model.order", "--bogus", "--help"),
        *("--data.image_size", "--data.batch_size", "--precision", "--devices=1", "--accelerator=cpu", "-h"),
    ]
    harmless = {"fit": ["--data.source=digits", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]}
    harmless |= {"evaluate": ["--data.source=digits", "--limit=3"], "sample": ["--num_samples=2"], "app": ["--port=-1"]}
    harmless |= dict.fromkeys(("validate", "test"), harmless["fit"]) | {"publish": ["--dry_run=true"]}
    for _ in range(COMMAND_LINES):
        command = draw.choice([*SUMMARIES, *SUMMARIES, "frobnicate", "--version"])
        args = [command]
        args += draw.choices(words, k=draw.randrange(3))
        for _ in range(draw.randrange(4)):
            option = draw.choice(options)
            args += [f"{option}={draw.choice(words)}"] if draw.random() < 0.5 else [option, draw.choice(words)]
        args += harmless.get(command, [])
        if "verify" in args or "https://x" in args:  # minutes, or the network
            continue
        try:
            main(args)
            code: Any = 0
        except SystemExit as error:
            code = error.code
        except Exception as error:
            raise AssertionError(f"a traceback of genmodels {args}") from error
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("genmodels: error: ")]
        assert (code in (0, None) and not lines) or (code == 2 and len(lines) == 1), (args, code, printed.err)


@pytest.mark.slow(reason="starts processes")
def test_a_reader_that_stops_early_sees_no_traceback(folder: Path) -> None:
    np.save("many.npy", np.zeros((9000, 28, 28), dtype=np.uint8))
    command = [sys.executable, "-m", "lightning_genmodels.cli", "log_prob", "bernoulli", "many.npy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 141


@pytest.mark.slow(reason="starts a process, and waits")
@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_fit_says_how_to_go_on(folder: Path, saved: bool) -> None:
    last = folder / "run" / "checkpoints" / "last.ckpt"
    options = ["--trainer.accelerator=cpu", "--data.source=digits", "--trainer.default_root_dir=run"]
    options += ["--trainer.max_epochs=100000", "--model=made"] + (
        [] if saved else ["--trainer.limit_train_batches=1.0"]
    )
    options += [] if saved else ["--trainer.val_check_interval=1.0", "--data.batch_size=1"]
    said = interrupted(["fit", *options], lambda: last.is_file() if saved else (folder / "run/config.yaml").is_file())
    if saved:
        assert said == f"genmodels: interrupted; go on from {Path('run/checkpoints/last.ckpt')} with --ckpt_path last"
    else:
        assert said == "genmodels: interrupted; there is no checkpoint yet"


@pytest.mark.slow(reason="starts a process, and waits")
def test_an_interrupted_command_leaves_nothing(folder: Path) -> None:
    start = time.monotonic()
    before = sorted(folder.iterdir())
    args = ["sample", "nade", "--num_samples=1000000", "--out=x.npy"]
    assert interrupted(args, lambda: time.monotonic() - start > 15) == "genmodels: interrupted; nothing was written"
    assert sorted(folder.iterdir()) == before


def interrupted(args: list[str], is_time: Callable[[], bool]) -> str:
    """The last line of a command that Ctrl-C ends."""
    command = [sys.executable, "-m", "lightning_genmodels.cli", *args]
    # A shell without job control makes what runs in the background deaf to it, and that is inherited.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", heard, *command], stderr=subprocess.PIPE, text=True) as process:
        while not is_time() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    return said.splitlines()[-1]


def hubconf() -> ModuleType:
    path = Path(__file__).parents[1] / "hubconf.py"
    spec = importlib.util.spec_from_file_location("hubconf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
