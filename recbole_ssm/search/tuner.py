"""Searches: Ray Tune's Tuner over trials of one model on one set."""

import math
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole.utils import init_logger

from recbole_ssm.config import Config
from recbole_ssm.data import create_dataset
from recbole_ssm.distributed.ray_cluster import all_gpus_visible, start_ray
from recbole_ssm.errors import UserError
from recbole_ssm.places import LOGS_REMEDY, check_folder
from recbole_ssm.search.definition import FOLDER_PREFIX, METRIC, Search
from recbole_ssm.search.space import Parameter, Space, read_space, search_file, space_of
from recbole_ssm.settings import near

if TYPE_CHECKING:
    from ray.tune import ResultGrid, Tuner

# ASHA looks first after a tenth of a run's evaluations, and lets a third of the trials pass each look.
FIRST_LOOK, REDUCTION = 10, 3


def tune(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    *,
    space: Space | dict[str, Any] | str | Path | None = None,
    storage_path: str | Path = "search",
    name: str | None = None,
    address: str | None = None,
    **options: Any,
) -> "ResultGrid":
    """Search a model's settings with Ray Tune, by the validation set.

    Each trial is a run of :func:`recbole_ssm.run_recbole` without its test. Trials are compared by the best validation
    score so far, in the direction of ``valid_metric``. A trial that fails is noted, and the search goes on.

    Args:
        model: model name, ours or RecBole's.
        dataset: dataset name.
        config_file_list: YAML files with settings of all trials.
        config_dict: settings of all trials, above those of the files.
        space: what is searched: a file (:func:`recbole_ssm.search.read_space`) or its content; the model's own in
            ``properties/search`` where absent.
        storage_path: folder that keeps the search; all nodes of a cluster must see it.
        name: of the search, a folder in there; model, dataset and time where absent.
        address: of a running Ray cluster; one on this machine is started where absent.
        options: see :class:`Search`.

    Returns:
        Ray's ResultGrid: a ``ray.tune.Result`` a trial, with the checkpoint of its best model.

    Raises:
        UserError: for settings, a space or data that cannot be used.
    """
    with all_gpus_visible():
        config = Config(model, dataset, config_file_list, config_dict)
    settings = {**config.external_config_dict, "model": config["model"], "dataset": config["dataset"]}
    # Trials run in folders, and perhaps on machines, of their own.
    settings["data_path"] = str(Path(config.given["data_path"]).resolve())
    plain = {key: parameter.plain() for key, parameter in _space(config, space).items()}
    search = Search(settings, plain, bool(config["valid_metric_bigger"]), **options)
    name = name or f"{config['model']}-{config['dataset']}-{datetime.now():%b-%d-%Y_%H-%M-%S}"
    folder = Path(storage_path).resolve() / name
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another name, or resume that search.")
    check_folder(folder.parent, "choose another folder (--storage_path)")
    check_folder(f"log/{config['model']}", LOGS_REMEDY)
    start_ray(address)
    trainable = _trainable(search)
    search.write(folder)
    return _tuner(search, trainable, folder).fit()


def resume(folder: str | Path, address: str | None = None) -> "ResultGrid":
    """Go on with a search that was interrupted or killed; trials that had finished or failed stay as they are.

    Args:
        folder: of the search.
        address: see :func:`tune`.

    Raises:
        UserError: for a folder that holds no search.
    """
    folder = Path(folder).resolve()
    search = Search.read(folder)
    start_ray(address)
    from ray.tune import Tuner

    return Tuner.restore(str(folder), _trainable(search)).fit()


def _space(config: Config, given: Space | dict[str, Any] | str | Path | None) -> Space:
    if given is None:
        given = search_file(config["model"])
        if not given.is_file():
            raise UserError(f"no search space is shipped for {config['model']}: give one with --params_file.")
    space = read_space(given) if isinstance(given, str | Path) else given
    if not all(isinstance(parameter, Parameter) for parameter in space.values()):
        space = space_of(space)
    for name in space:
        if name not in config:
            raise UserError(f"{config['model']} has no setting {name!r} to search{near(name, list(config.given))}")
    return space


def _trainable(search: Search) -> Any:
    from ray import tune

    from recbole_ssm.search.trial import train_trial

    with all_gpus_visible():
        config = search.config()
    init_logger(config)
    dataset = create_dataset(config)
    trainable = tune.with_parameters(train_trial, search=search, dataset=dataset)
    return tune.with_resources(trainable, {"cpu": search.cpus_per_trial, "gpu": search.gpus_per_trial})


def _tuner(search: Search, trainable: Any, folder: Path) -> "Tuner":
    from ray import tune
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback

    from recbole_ssm.search.progress import Progress

    config = search.config()
    evaluations = math.ceil(config["epochs"] / config["eval_step"])
    space = search.parameters()
    return tune.Tuner(
        trainable,
        param_space=_grid(space) if search.algorithm == "grid" else {n: p.domain() for n, p in space.items()},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max" if search.bigger else "min",
            num_samples=search.num_samples,
            max_concurrent_trials=None if search.algorithm in ("random", "grid") else search.max_concurrent,
            time_budget_s=search.time_budget,
            scheduler=_scheduler(search, evaluations),
            search_alg=_algorithm(search),
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[
                Progress(config["valid_metric"], list(space), search.trial_count()),
                JsonLoggerCallback(),
                CSVLoggerCallback(),
            ],
            verbose=0,
        ),
    )


def _folder_name(trial: Any) -> str:
    return f"{FOLDER_PREFIX}{trial.trial_id}"


def _grid(space: Space) -> dict[str, Any]:
    from ray import tune

    return {name: tune.grid_search(parameter.grid()) for name, parameter in space.items()}


def _scheduler(search: Search, evaluations: int) -> Any:
    from ray.tune import schedulers

    time = {"time_attr": "training_iteration"}
    look = max(1, evaluations // FIRST_LOOK)
    if search.scheduler == "asha":
        return schedulers.ASHAScheduler(**time, max_t=evaluations, grace_period=look, reduction_factor=REDUCTION)
    if search.scheduler == "median":
        return schedulers.MedianStoppingRule(**time, grace_period=look)
    return None


def _algorithm(search: Search) -> Any:
    from ray.tune.search import BasicVariantGenerator

    if search.algorithm in ("random", "grid"):
        return BasicVariantGenerator(max_concurrent=search.max_concurrent or 0, random_state=search.seed)
    try:
        if search.algorithm == "optuna":
            import optuna
            from ray.tune.search.optuna import OptunaSearch

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            return OptunaSearch(seed=search.seed)
        from ray.tune.search.hyperopt import HyperOptSearch

        return HyperOptSearch(random_state_seed=search.seed)
    except (ImportError, AssertionError) as error:
        raise UserError(f"{search.algorithm} is not installed ({error}): pip install {search.algorithm}") from error
