"""What a run says of its epochs: a line each, and learning curves."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lightning_genmodels.cli import main
from lightning_genmodels.errors import FileError
from lightning_genmodels.training.curves import CURVES, read_curves, write_curves


def test_a_line_after_every_epoch_where_there_is_no_terminal(
    run_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        main(
            [
                *("fit", "--model=vae", "--data.source=digits", "--trainer.accelerator=cpu", "--trainer.max_epochs=5"),
                *("--trainer.check_val_every_n_epoch=2", "--trainer.log_every_n_steps=4", "--samples.every_n_epochs=0"),
            ]
        )
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch ")]
    assert [line.partition(":")[0] for line in lines] == [f"epoch {epoch} of 5" for epoch in range(1, 6)]
    assert ["val/nelbo" in line for line in lines] == [False, True, False, True, True]  # and the last one


def test_curves_join_a_resumed_run_and_need_one(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version, rows in enumerate(["0,1,5.0,\n0,2,,7.5\n", "1,3,4.0,\n1,4,,6.5\n"]):
        folder = run_folder / "run" / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"epoch,step,train/loss,val/nll\n{rows}")
    assert read_curves(run_folder / "run") == {"train/loss": [(1, 5.0), (3, 4.0)], "val/nll": [(2, 7.5), (4, 6.5)]}
    pytest.importorskip("matplotlib")
    main(["curves", "run", "run", "--out=both.png"])
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["curves", "run", "--over_minutes=true"])
    assert "did not note its CPU time" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["curves", "elsewhere"])
    assert "elsewhere holds no logs of a run" in capsys.readouterr().err


def test_a_weight_keeps_the_validation_curves_of_its_run(run_folder: Path) -> None:
    folder = run_folder / "run" / "logs" / "version_0"
    folder.mkdir(parents=True)
    rows = [f"{step},{step / 10},5.0,{7.0 - step / 1000}\n" for step in range(500)]
    (folder / "metrics.csv").write_text(f"step,train/cpu_minutes,train/loss,val/nll\n{''.join(rows)}")
    write_curves(run_folder / "run", run_folder, points=100)
    kept, whole = read_curves(run_folder / CURVES), read_curves(run_folder / "run")
    assert set(kept) == {"train/cpu_minutes", "val/nll"}
    for name, curve in kept.items():
        assert len(curve) == 100
        assert set(curve) <= set(whole[name])
    pytest.importorskip("matplotlib")
    main(["curves", CURVES, "--over_minutes=true"])
    assert Path("curves.png").is_file()


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b'{"val/nll": [[1]]}', b'{"val/nll": [[1, "x"]]}'])
def test_a_file_that_holds_no_curves_is_refused(content: bytes | None, run_folder: Path) -> None:
    if content is not None:
        Path(CURVES).write_bytes(content)
    with pytest.raises(FileError, match="cannot read learning curves from"):
        read_curves(Path(CURVES))


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("vae", {"reconstructions", "completions"}),
        ("ladder_vae", {"reconstructions"}),
        ("made", {"completions"}),
        ("gan", set()),
    ],
)
def test_pictures_of_what_a_model_can_do(name: str, pictures: set[str], run_folder: Path) -> None:
    quick = ["--data.source=digits", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--samples.num_samples=4"]
    main(["fit", f"--model={name}", *quick, "--trainer.limit_train_batches=2", "--trainer.default_root_dir=run"])
    drawn = {folder.name for folder in Path("run").iterdir() if list(folder.glob("epoch_0001.png"))}
    assert drawn == {"samples", *pictures}
    for picture in pictures:
        with Image.open(Path("run", picture, "epoch_0001.png")) as image:
            assert image.size == (2 * (16 * 30 + 2), 2 * (2 * 30 + 2))


def test_cpu_time_goes_on_after_a_resume(run_folder: Path) -> None:
    quick = [
        *("fit", "--model=vae", "--data.source=digits", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=2"),
        *("--samples.every_n_epochs=0", "--trainer.default_root_dir=run"),
    ]
    main([*quick, "--trainer.max_epochs=1"])
    main([*quick, "--trainer.max_epochs=2", "--ckpt_path=last"])
    minutes = [value for _, value in read_curves(Path("run"))["train/cpu_minutes"]]
    assert len(minutes) > 4
    assert minutes == sorted(minutes)
    pytest.importorskip("matplotlib")
    main(["curves", "run", "--over_minutes=true"])
    assert Path("curves.png").is_file()
