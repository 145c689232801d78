"""Train, test, load: RecBole's ``quick_start`` with its signatures and return values."""

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.transform import construct_transform
from recbole.utils import (
    EvaluatorType,
    FeatureType,
    ModelType,
    calculate_valid_score,
    get_environment,
    get_flops,
    init_seed,
    set_color,
)

from recbole_ssm.checkpoint import REMEDY, expect, load_checkpoint, load_weights
from recbole_ssm.config import Config
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.data.identity import check_identity, is_vocabulary
from recbole_ssm.distributed import rank, world_size
from recbole_ssm.distributed.launch import launch, run_rank
from recbole_ssm.doctor import prefetch
from recbole_ssm.errors import UserError
from recbole_ssm.layers.item_features import check_is_column
from recbole_ssm.logs import start_logging
from recbole_ssm.places import CHECKPOINTS_REMEDY, check_folder
from recbole_ssm.registry import MODELS, model_class
from recbole_ssm.results import Run, protocol
from recbole_ssm.settings.values import is_plain
from recbole_ssm.trainer import SequenceTrainer, get_trainer

# What processes that a script starts itself find one another by.
PLACES = ("nproc", "world_size", "offset", "ip", "port")


def run_recbole(model=None, dataset=None, config_file_list=None, config_dict=None, saved=True, queue=None):
    """Train a model on a dataset and test it, as :func:`recbole.quick_start.run_recbole`.

    Args:
        model (str): model name, ours or RecBole's.
        dataset (str): dataset name.
        config_file_list (list of str): YAML files with settings.
        config_dict (dict): settings, above those of the files.
        saved (bool): whether to save the model, and test the best epoch's rather than the last's.
        queue (torch.multiprocessing.Queue): where a spawned process puts its result.

    Returns:
        dict: ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``, ``test_result``, and ``checkpoint``,
        the model's file, None where it is not ``saved``.

    Raises:
        UserError: for settings, data or folders that cannot be used.
    """
    run = train_and_test(Config(model, dataset, config_file_list, config_dict), saved=saved)
    result = {**run.result, "checkpoint": run.checkpoint}
    if queue is not None and run.config["local_rank"] == 0:
        queue.put(result)
    return result


def train_and_test(
    config: Config,
    saved: bool = True,
    resume_file: str | None = None,
    callback_fn: Callable | None = None,
) -> Run:
    """Train and test by a configuration, from the start or from a checkpoint.

    Args:
        config: the configuration.
        saved: see :func:`run_recbole`.
        resume_file: checkpoint of an interrupted run with this configuration.
        callback_fn: called with the epoch's index and its validation score after each evaluation, as RecBole's.
    """
    if resume_file is None:
        return fit(*prepare(config, saved=saved), saved, callback_fn=callback_fn)
    with _settings_of(resume_file):
        trainer, loaders = prepare(config, saved=saved)
    with _settings_of(resume_file, proven=lambda: bool(trainer.train_loss_dict)):
        return fit(trainer, loaders, saved, resume_file, callback_fn)


def fit(
    trainer,
    loaders,
    saved: bool = True,
    resume_file: str | None = None,
    callback_fn: Callable | None = None,
) -> Run:
    """Train and test what :func:`prepare` made; see :func:`train_and_test`."""
    config, logger = trainer.config, logging.getLogger()
    train_data, valid_data, test_data = loaders
    if resume_file is not None:
        trainer.resume_checkpoint(resume_file)
    best_valid_score, best_valid_result = trainer.fit(
        train_data, valid_data, saved=saved, show_progress=config["show_progress"], callback_fn=callback_fn
    )
    try:
        test_result = trainer.evaluate(test_data, load_best_model=saved, show_progress=config["show_progress"])
    except KeyboardInterrupt:
        file = shlex.quote(str(trainer.saved_model_file))
        again = f"; test it with: run_recbole --checkpoint {file} --mode evaluate" if saved else "."
        raise KeyboardInterrupt(f"interrupted in the test, after training{again}") from None

    logger.info("The running environment of this training is as follows:\n" + get_environment(config).draw())
    result = {
        "best_valid_score": best_valid_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid_result,
        "test_result": test_result,
    }
    checkpoint = str(trainer.saved_model_file) if saved else None
    log_results(config, result, checkpoint)
    timings = trainer.timings.summary() if hasattr(trainer, "timings") else {}
    return Run(config, result, checkpoint, timings, getattr(trainer, "best_epoch", None))


def prepare(config: Config, dataset=None, saved: bool = True) -> tuple[Any, Any]:
    """All that a run has before its first step.

    Args:
        config: the configuration.
        dataset: the filtered data, where they are loaded already.
        saved: whether the model is to be saved.

    Returns:
        The trainer of a freshly initialised model, and the training, validation and test loaders.
    """
    logger = start_logging(config)
    if saved or config["save_dataset"]:
        check_folder(config["checkpoint_dir"], CHECKPOINTS_REMEDY)
    dataset, loaders = load_data(config, dataset)
    model = build_model(config, loaders[0])
    logger.info(model)
    if config["model"] not in MODELS and len(dataset) > 1:
        # RecBole counts the layers that it knows, which leaves the scans of our models out, by the second row.
        flops = get_flops(model, dataset, config["device"], logger, construct_transform(config))
        logger.info(set_color("FLOPs", "blue") + f": {flops}")
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    if world_size() > 1 and not isinstance(trainer, SequenceTrainer):
        raise UserError(f"{config['model']} has a trainer of its own, which runs in one process: leave --nproc out.")
    return trainer, loaders


def evaluate(checkpoint: str, settings: dict[str, Any] | None = None) -> Run:
    """Evaluate a checkpoint's best model on its validation and test sets, with ``settings`` above its own."""
    config, model, _, train_data, valid_data, test_data = load_data_and_model(checkpoint, settings)
    with _settings_of(checkpoint):
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        trainer.eval_collector.data_collect(train_data)
        valid_result, test_result = (
            trainer.evaluate(data, load_best_model=False, show_progress=config["show_progress"])
            for data in (valid_data, test_data)
        )
    result = {
        "best_valid_score": valid_result and calculate_valid_score(valid_result, config["valid_metric"].lower()),
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": valid_result,
        "test_result": test_result,
    }
    log_results(config, result, checkpoint)
    return Run(config, result, checkpoint, trainer.timings.summary())


def load_data_and_model(model_file, settings=None):
    """Load the data and the best model of a checkpoint, as :func:`recbole.quick_start.load_data_and_model`.

    Args:
        model_file (str): checkpoint file.
        settings (dict): settings above those that it was trained with.

    Returns:
        tuple: config, model, dataset, train_data, valid_data, test_data.

    Raises:
        UserError: for a file that is no checkpoint, or data that no longer fit it.
    """
    config = config_of(model_file, settings)
    with _settings_of(model_file):
        start_logging(config)
        dataset, (train_data, valid_data, test_data) = load_data(config)
        model = build_model(config, train_data)
        load_weights(model, load_checkpoint(model_file, config["device"]), model_file)
    return config, model.eval(), dataset, train_data, valid_data, test_data


def config_of(model_file: str, settings: dict[str, Any] | None = None, state: dict[str, Any] | None = None) -> Config:
    """The configuration that a checkpoint was trained with, and ``settings`` above it; it numbers data as that did.

    ``state`` is what the file holds, where it is read already.
    """
    state = load_checkpoint(model_file) if state is None else state
    given = state.get("config", {})
    expect(model_file, {"config": given}, config=dict)
    if not given:
        raise UserError(f"{model_file} does not say what it was trained with; give it to RecBole's own functions.")
    if not is_plain(given):
        raise UserError(f"{model_file} holds settings that are no words and numbers: {REMEDY}")
    with _settings_of(model_file, name=True):
        config = Config.rebuild(given, {"checkpoint_dir": str(Path(model_file).parent), **(settings or {})})
    if "vocabulary" in state:
        expect(model_file, state, vocabulary=dict, data=dict)
        if not is_vocabulary(state["vocabulary"]):
            raise UserError(f"{model_file} holds a vocabulary that is no list of different words: {REMEDY}")
        config.identity = {"file": model_file, "vocabulary": state["vocabulary"], "data": state["data"]}
    return config


@contextmanager
def _settings_of(file: str, name: bool = False, proven: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Say of a checkpoint's file what its settings, which may be anybody's, bring about.

    Args:
        file: the file.
        name: whether sentences about settings are to name it, too.
        proven: whether so much has been done by it that what goes wrong now is not for its sake.
    """
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise UserError(f"{file}: {error}") from error
    except Exception as error:
        if proven():
            raise
        logging.getLogger().debug("", exc_info=error)
        what = f"({type(error).__name__}: {' '.join(str(error).split())})"
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise UserError(
                f"{file} takes more memory than there is {what}: free some, or give smaller batches "
                "(--train_batch_size, --eval_batch_size)."
            ) from error
        raise UserError(
            f"{file} cannot be used as it is {what}: its settings or the data are not those of a finished run, or this "
            "is a mistake of recbole-ssm; --state=DEBUG shows where."
        ) from error


def load_data(config: Config, dataset=None):
    """The filtered dataset (``dataset`` where it is loaded already), and its training, validation and test loaders."""
    dataset = create_dataset(config) if dataset is None else dataset
    if config.identity:
        check_identity(dataset, config.identity, config.identity["file"])
    logging.getLogger().info(dataset)
    # RecBole takes the first of as many scores as there are numbers of items, the padding's among them.
    if config["eval_type"] == EvaluatorType.RANKING and max(config["topk"]) > dataset.item_num:
        raise UserError(
            f"topk is {config['topk']}, but {config['dataset']} has {dataset.item_num - 1} items: set --topk to at "
            "most that, and --valid_metric to one of it."
        )
    return dataset, data_preparation(config, dataset)


def build_model(config: Config, train_data):
    """A freshly initialised model on the configured device."""
    prefetch(config)
    _refuse_pickles(config, train_data._dataset)
    _check_features(config, train_data._dataset)
    init_seed(config["seed"] + rank(), config["reproducibility"])
    try:
        return model_class(config)(config, train_data._dataset).to(config["device"])
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{config['model']} cannot be built with these settings: {error}.") from error


def _check_features(config: Config, dataset: Any) -> None:
    """Look for the columns that RecBole's own models with item features read, of which some can be no numbers."""
    selected = config["selected_features"]
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL or not isinstance(selected, list):
        return
    for field in selected:
        check_is_column(dataset, "selected_features", field)
    numbers = [field for field in selected if dataset.field2type[field] in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ)]
    if numbers and (config["model"] != "FDSA" or len(numbers) == len(selected)):
        raise UserError(
            f"selected_features names {', '.join(numbers)}, of numbers: {config['model']} wants columns of tokens."
        )


def _refuse_pickles(config: Config, dataset: Any) -> None:
    """Refuse a file beside the data that RecBole would unpickle."""
    if config["model"] != "LDiffRec":
        return
    embeddings = Path(dataset.dataset_path, "item_emb.npy")
    if embeddings.is_file():
        try:
            np.load(embeddings, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(
                f"{embeddings} is no array of plain numbers, and what else it holds could run code: save it by "
                "numpy.save(..., allow_pickle=False)."
            ) from error


def log_results(config: Config, result: dict[str, Any], checkpoint: str | None) -> None:
    """The closing lines: how it was measured, RecBole's two and where the model lies."""
    logger = logging.getLogger()
    logger.info(set_color("protocol   ", "yellow") + f": {protocol(config)}")
    logger.info(set_color("best valid ", "yellow") + f": {result['best_valid_result']}")
    logger.info(set_color("test result", "yellow") + f": {result['test_result']}")
    if checkpoint is not None:
        logger.info(set_color("checkpoint ", "yellow") + f": {checkpoint}")


def run(
    model,
    dataset,
    config_file_list=None,
    config_dict=None,
    saved=True,
    nproc=1,
    world_size=-1,
    ip="localhost",
    port="5678",
    group_offset=0,
):
    """Run in one process, or in several that train one model, as :func:`recbole.quick_start.run`.

    ``train_batch_size`` is that of all processes together; results are those of one process with it, up to rounding
    and the random numbers that each process draws for itself.

    Args:
        model (str): see :func:`run_recbole`, as for the next four.
        dataset (str): dataset name.
        config_file_list (list of str): YAML files with settings.
        config_dict (dict): settings, above those of the files.
        saved (bool): whether to save the model.
        nproc (int): see :func:`recbole_ssm.distributed.launch.launch`, as for the last four.
        world_size (int): processes on all machines.
        ip (str): address of the first machine.
        port (str): its port.
        group_offset (int): rank of this machine's first process.

    Raises:
        UserError: for settings or data that cannot be used, or where a process fails or dies.
    """
    if nproc == 1 and world_size <= 0:
        return run_recbole(model, dataset, config_file_list, config_dict, saved)
    configuration, settings = partial(Config, model, dataset, config_file_list), config_dict or {}
    job = partial(train_by_settings, configuration, saved=saved)
    return launch(job, configuration(settings), settings, nproc, world_size, ip, port, group_offset)


def run_recboles(rank, *args):
    """One of several processes that a script starts itself, as :func:`recbole.quick_start.run_recboles`.

    Args:
        rank (int): its number on this machine.
        args: model, dataset and config files of :func:`run_recbole`, and a dict of its other arguments, ``saved``,
            ``queue`` and ``config_dict``, with :data:`PLACES` in it as :func:`recbole.quick_start.run` gives them.

    Raises:
        UserError: where the last one is none or ``config_dict`` does not say how the processes find one another.
        SystemExit: where the process fails, with the reason in the ``queue``.
    """
    *given, keywords = args
    settings = (keywords.get("config_dict") or {}) if isinstance(keywords, dict) else {}
    missing = [name for name in PLACES if name not in settings]
    if missing:
        raise UserError(f"run_recboles takes a dict last, whose config_dict lacks {', '.join(missing)}.")
    configuration = partial(Config, *given[:3])
    job = partial(train_by_settings, configuration, saved=keywords.get("saved", True))
    run_rank(rank, job, settings, keywords.get("queue") or torch.multiprocessing.get_context("spawn").SimpleQueue())


def objective_function(config_dict=None, config_file_list=None, saved=True):
    """One trial of RecBole's ``HyperTuning`` or of a search of one's own, as RecBole's of the same name.

    Args:
        config_dict (dict): settings of the trial, ``model`` and ``dataset`` among them or in the files.
        config_file_list (list of str): YAML files with settings.
        saved (bool): see :func:`run_recbole`.

    Returns:
        dict: RecBole's result and the ``model``. In a trial of Ray Tune the test's metrics are reported to it, too.
    """
    run = train_and_test(Config(config_file_list=config_file_list, config_dict=config_dict), saved=saved)
    if (tune := sys.modules.get("ray.tune")) is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Ray, where this is none of its trials
            tune.report(dict(run.result["test_result"]))
    return {"model": run.config["model"], **run.result}


def train_by_settings(
    configuration: Callable[[dict[str, Any]], Config],
    settings: dict[str, Any],
    saved: bool = True,
    resume_file: str | None = None,
    result_file: str | None = None,
) -> dict[str, Any]:
    """What each of several processes does: :func:`train_and_test`, and the first writes what there is to tell.

    Args:
        configuration: makes the configuration from ``settings``.
        settings: those of this process.
        saved: see :func:`run_recbole`.
        resume_file: checkpoint of an interrupted run with this configuration, by however many processes.
        result_file: see :meth:`Run.write`.

    Returns:
        RecBole's result.
    """
    run = train_and_test(configuration(settings), saved, resume_file)
    if result_file is not None and run.config["local_rank"] == 0:
        run.write(result_file)
    return run.result
