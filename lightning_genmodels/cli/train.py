"""Lightning's ``fit``, ``validate`` and ``test``, with this package's data module, checkpoints and averaged weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_genmodels import __version__
from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.cli import TRAINER_COMMANDS, recipes
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.errors import OptionError, UnknownNameError, WeightsError, within
from lightning_genmodels.system import MatmulPrecision, check_folder, set_matmul_precision, write_atomically
from lightning_genmodels.training import callbacks, launch, tracking
from lightning_genmodels.training.preemption import Preempted, Preemption
from lightning_genmodels.weights import files
from lightning_genmodels.weights.names import importable_models, list_models, model_class, model_name

_NOTHING = nullcontext()


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration to ``config.yaml`` in the folder of the run, and to the logger."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes at once where nothing is fitted."""
        if stage != "fit" and trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes once a checkpoint is restored, so that a resume that fails leaves the run's configuration alone."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on the first process only."""
        text = self.parser.dump(self.config, skip_unset=False)
        if stage == "fit":
            write_atomically(Path(trainer.default_root_dir) / callbacks.CONFIG, text.encode())
        protocol = trainer.datamodule.protocol  # type: ignore[attr-defined]
        logged = {
            **tracking.without_paths(yaml.safe_load(text)),
            "protocol": protocol,
            "made_by": tracking.provenance(__version__),
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(logged)


class NoProfiler(PassThroughProfiler):
    """What Lightning uses where no profiler is asked for, without a generator for each of the 85 calls of a step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Returns a context in which nothing happens."""
        return _NOTHING


class TrainingCLI(LightningCLI):
    """Lightning's command line with this package's data module, checkpoints, sample grids and averaged weights."""

    def __init__(self, args: Sequence[str]) -> None:
        launch.hide_advice()
        list(importable_models())  # so that their class names alone are known to the parser
        self._held = ExitStack()
        try:
            super().__init__(
                GenerativeModel,
                BinarizedMNISTDataModule,
                subclass_mode_model=True,
                save_config_callback=SaveConfig,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs={"version": __version__, "exit_on_error": False, **_raising()},
                args=_expand_model_names(args),
            )
        except Preempted:
            raise
        except SystemExit as error:
            if not hasattr(self, "trainer") or self.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
            last = callbacks.last_path(self.trainer.default_root_dir)
            found = f"go on from {last} with --ckpt_path last" if last.is_file() else "there is no checkpoint yet"
            raise KeyboardInterrupt(found) from error
        finally:
            self._held.close()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses what ``main`` was given, of which Lightning would warn, and checks what it leaves unchecked."""
        self.config = parser.parse_args(args)
        options = self.config[self.config.subcommand]
        if not isinstance(options.seed_everything, bool):
            within(0, 2**32, seed_everything=options.seed_everything)
        if self.config.subcommand == "fit" and options.trainer.default_root_dir is not None:
            check_folder(Path(options.trainer.default_root_dir))

    def _parse_ckpt_path(self) -> None:
        """Takes no hyper-parameters from a checkpoint: the recipe says them."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Fit, validate and test."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in TRAINER_COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that recipes have beyond Lightning's."""
        parser.add_argument("--ema", type=float | None, default=None, help="Decay of an average of the weights.")
        parser.add_argument("--compile", type=bool, default=False, help="Compile the networks before training.")
        parser.add_argument(
            "--channels_last", type=bool, default=False, help="Store the weights of convolutions channels last."
        )
        parser.add_argument(
            "--matmul_precision",
            type=MatmulPrecision,
            default="highest",
            help="Of float32 products and convolutions: high and medium allow TF32 on GPUs.",
        )
        parser.add_argument(
            "--save_every_n_batches", type=int, default=0, help="Also save last.ckpt within an epoch; 0 for never."
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in a folder that holds a run, which is deleted."
        )
        parser.add_class_arguments(tracking.WandbOptions, "wandb")
        parser.add_lightning_class_args(callbacks.SampleGrid, "samples")
        parser.link_arguments("data.event_shape", "model.init_args.event_shape", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the checkpoints and the logger, which need the folder of the run and the model."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if not self.model.automatic_optimization and config["accumulate_grad_batches"] > 1:
            raise OptionError(
                f"a {type(self.model).__name__} takes its own steps and accumulates no gradients; leave out "
                "--trainer.accumulate_grad_batches, and choose a larger --data.batch_size"
            )
        set_matmul_precision(self._get(self.config_init, "matmul_precision"))
        if self._get(self.config_init, "channels_last"):
            self.model.to(memory_format=torch.channels_last)
        root = tracking.trial_folder(Path(config["default_root_dir"] or Path("runs") / model_name(type(self.model))))
        config["default_root_dir"] = str(root)
        if config["logger"] is None or config["logger"] is True:
            config["logger"] = self._loggers(root)
        extra = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        if self.subcommand == "fit":
            extra.append(callbacks.LastEpochValidation())
            extra += [callbacks.CompileNetworks()] if self._get(self.config_init, "compile") else []
            decay = self._get(self.config_init, "ema")
            # The grid comes before the average is swapped back; the last checkpoint holds the state of all others.
            extra += [callbacks.MovingAverage(decay)] if decay is not None else []
            last = None
            if config["enable_checkpointing"] is not False:
                extra.append(callbacks.BestCheckpoint())
                last = callbacks.LastCheckpoint(self._get(self.config_init, "save_every_n_batches"))
                extra.append(last)
                extra.append(tracking.ExportBest())
            extra.append(Preemption(last))
            extra.append(tracking.TrainingMonitor(config["log_every_n_steps"] or 50))
            extra += [LearningRateMonitor("step"), tracking.Lineage()] if config["logger"] else []
            if config["enable_progress_bar"] is None and not sys.stderr.isatty():
                config["enable_progress_bar"] = False  # a file of output shows its last state alone
                extra.append(tracking.EpochLines())
        launch.trainer_options(config)
        config["profiler"] = config["profiler"] or NoProfiler()
        config["plugins"].append(callbacks.WholeCheckpointIO())
        trainer = self._instantiate_trainer(config, extra)
        launch.check_size(trainer.world_size)
        return trainer

    def after_fit(self) -> None:
        """Says where the results are, and the best figure."""
        root = Path(self.trainer.default_root_dir)
        found: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        best = [callback for callback in found if isinstance(callback, callbacks.BestCheckpoint)]
        if best and best[0].best_model_score is not None:
            figure = f"best {best[0].monitor} {float(best[0].best_model_score):.3f}: {best[0].best_model_path}"
            rank_zero_info(f"{figure}; weights: {root / callbacks.EXPORTED}")

    def _loggers(self, root: Path) -> list[Logger]:
        loggers: list[Logger] = [CSVLogger(root, name="logs")]
        tags = [model_name(type(self.model)), self.datamodule.binarization]
        tracked = tracking.wandb_logger(self._get(self.config_init, "wandb"), root, tags, self.model.monitor)
        loggers += [] if tracked is None else [tracked]
        return loggers

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True  # nothing is unpickled from a checkpoint but tensors and plain values
        named = {
            "last": callbacks.last_path,
            "best": callbacks.best_path,
            "before_fall": callbacks.before_fall_path,
        }
        root = Path(self.trainer.default_root_dir)
        is_auto = kwargs["ckpt_path"] == "auto"
        # The first process alone: others may start when it is already at work in the folder.
        claims = subcommand == "fit" and getattr(rank_zero_only, "rank", 0) == 0
        if claims and is_auto:  # before it is looked into
            self._held.enter_context(callbacks.lock(root))
        if is_auto:  # what a job that may be restarted wants
            path = callbacks.newest_whole(root)
            kwargs["ckpt_path"] = None if path is None else str(path)
            if path is not None:
                rank_zero_info(f"going on from {path}")
        if kwargs["ckpt_path"] in named:
            path = named[kwargs["ckpt_path"]](root)
            if not path.is_file():
                raise WeightsError(
                    f"no checkpoint at {path}; start without --ckpt_path, or name the run's folder with "
                    "--trainer.default_root_dir"
                )
            kwargs["ckpt_path"] = str(path)
        trained_with: dict[str, Any] = {}
        if kwargs["ckpt_path"] is not None:
            trained_with = files.check_checkpoint(Path(kwargs["ckpt_path"]), self.model)
        if claims:
            if not is_auto:  # whose options are right by now
                self._held.enter_context(callbacks.lock(root))
            overwrite = self._get(self.config_init, "overwrite")
            callbacks.claim(root, resumes=kwargs["ckpt_path"] is not None or is_auto, overwrite=overwrite)
        if subcommand == "fit":
            _warn_of_ignored(trained_with, self.model)
        return kwargs


def _warn_of_ignored(trained_with: Mapping[str, Any], model: GenerativeModel) -> None:
    """Says which options a resumed run ignores: those that the optimizers in its checkpoint hold."""
    for name in ("learning_rate", "weight_decay", "betas", "muon_learning_rate"):
        asked, kept = json.dumps(model.hparams.get(name)), json.dumps(trained_with.get(name))
        if name in trained_with and asked != kept:
            rank_zero_warn(
                f"the run goes on with {name}={kept} of its checkpoint, and not with {asked}; to change it, start "
                "another run from the weights: --model.init_from CHECKPOINT --trainer.default_root_dir FOLDER",
                category=UserWarning,
            )


def _raising() -> dict[str, Any]:
    """Options of the parsers of the commands: an error is raised, and not printed below a page of usage."""
    return {name: {"exit_on_error": False} for name in TRAINER_COMMANDS}


def _expand_model_names(args: Sequence[str]) -> list[str]:
    """Turns ``--model vae`` into the path of its class, and ``--config vae`` into that of its recipe."""
    expanded = list(args)
    for index, argument in enumerate(expanded):
        recipe = argument.removeprefix("--config=")
        if (recipe != argument or (index > 0 and expanded[index - 1] == "--config")) and recipe in recipes():
            if not Path(recipe).is_file():
                expanded[index] = argument.removesuffix(recipe) + str(recipes()[recipe])
            continue
        name = argument.removeprefix("--model=")
        follows = index > 0 and expanded[index - 1] == "--model"
        if not (follows or name != argument):
            continue
        if name.isidentifier() and name not in {*list_models(), *(m.__name__ for m in importable_models())}:
            raise UnknownNameError("model", name, list_models())
        if name in list_models():
            cls = model_class(name)
            prefix = "" if follows else "--model="
            expanded[index] = f"{prefix}{cls.__module__}.{cls.__qualname__}"
    return expanded
