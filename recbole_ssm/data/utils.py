"""RecBole's ``create_dataset`` and ``data_preparation``, with our datasets and loaders in them."""

import logging
from pathlib import Path

import numpy as np
import recbole.data.dataset
from recbole.data.dataset import SequentialDataset
from recbole.data.utils import create_samplers, get_dataloader
from recbole.sampler import KGSampler
from recbole.utils import ModelType, set_color

from recbole_ssm.data.atomic_files import hardened, one_line, settings_of
from recbole_ssm.data.full_ranking import UnseenItemsDataLoader
from recbole_ssm.data.negatives import check_loader
from recbole_ssm.data.saved import load_dataset, made_by, save_dataset
from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.data.sequence_loader import SequenceDataLoader
from recbole_ssm.distributed import shard_batches, world_size
from recbole_ssm.errors import UserError

# Scores that exist at a time in full ranking, on a CPU and on a GPU; RecBole's metrics make some copies of them.
SCORES_AT_A_TIME = (1 << 22, 1 << 28)

DATASET_CLASSES = {
    ModelType.SEQUENTIAL: "SequentialDataset",
    ModelType.KNOWLEDGE: "KnowledgeBasedDataset",
}


def dataset_class(config) -> type:
    """The dataset class that RecBole's rules name for a model, made to answer bad files in plain words.

    ``<Model>Dataset`` of :mod:`recbole.data.dataset` where there is one, else the class of the model's type;
    :class:`SequenceDataset` for any model that is trained on whole histories. Sets split beforehand
    (``benchmark_filename``) hold rows already and always take RecBole's own class.
    """
    name = config["model"] + "Dataset"
    if not hasattr(recbole.data.dataset, name):
        name = DATASET_CLASSES.get(config["MODEL_TYPE"], "Dataset")
    found = SequenceDataset if config["train_mode"] == "sequence" else getattr(recbole.data.dataset, name)
    if found is SequenceDataset and config["benchmark_filename"] is not None:
        found = SequentialDataset
    return hardened(found)


def create_dataset(config):
    """As :func:`recbole.data.create_dataset`; a saved dataset is data alone, and used only where it is still right.

    Raises:
        UserError: for files that are missing or cannot be read.
    """
    cls = dataset_class(config)
    default = Path(config["checkpoint_dir"], f"{config['dataset']}-{cls.__name__}.pth")
    named = config["dataset_save_path"]
    # A checkpoint has numbers of its own for items, which the default file was not made with.
    if named or (default.is_file() and not config.identity):
        try:
            saved = load_dataset(named or default, config, cls)
        except UserError as error:
            if named:
                raise
            logging.getLogger().warning(f"{error} The dataset is made anew.")
            saved = None
        if saved is not None:
            return saved
    dataset = cls(config)
    if config["save_dataset"]:
        save_dataset(dataset, default)
    return dataset


def made_alike(config, other) -> bool:
    """Whether two configurations give the same filtered data."""
    return made_by(config) == made_by(other) and dataset_class(config) is dataset_class(other)


def data_preparation(config, dataset):
    """As :func:`recbole.data.data_preparation`; ``train_mode: sequence`` trains on whole histories.

    Loaders are always made anew: those that RecBole saves are pickles, which could run code.

    Returns:
        Training, validation and test loaders.

    Raises:
        UserError: for settings that sequence mode cannot follow, a split that leaves nothing to train on, or a
            catalogue that is smaller than a list to recommend or in which there is no negative to draw.
    """
    _bound_scores(config, dataset)
    if config["allow_repeats"] is False:
        _tell_repeats(dataset)
    label = config["LABEL_FIELD"]
    if "labeled" in config["eval_args"]["mode"].values() and label not in dataset.field2type:
        raise UserError(
            f"mode labeled of eval_args needs labels, and {config['dataset']} has no column {label!r} that is loaded: "
            "name it by LABEL_FIELD and load_col, make it by threshold, or choose mode full, uniN or popN."
        )
    try:
        train_data, *eval_data = _loaders(config, dataset)
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:  # RecBole's own sentences
        raise UserError(
            f"{config['dataset']} cannot be split or sampled as it is set{settings_of(config)}, with eval_args "
            f"{config['eval_args']}: {one_line(error)}."
        ) from error
    except ArithmeticError as error:
        alpha = config["train_neg_sample_args"]["alpha"]
        raise UserError(
            f"alpha of train_neg_sample_args is {alpha}, and popularity to that power no number: choose one nearer 1."
        ) from error
    if config["train_mode"] != "sequence":
        check_loader(config, train_data, config["train_neg_sample_args"])
        shard_batches(train_data)
    for phase, data in zip(("valid", "test"), eval_data, strict=True):
        check_loader(config, data, config[f"{phase}_neg_sample_args"])
    if config["exclude_history"]:
        _check_exclusion(config, dataset)
        eval_data = [UnseenItemsDataLoader(config, data._dataset, data._sampler) for data in eval_data]
    return train_data, *(shard_batches(data) for data in eval_data)


def _loaders(config, dataset):
    whole_histories = config["train_mode"] == "sequence"
    if whole_histories:
        _check_sequence_mode(dataset)
    parts = dataset.build()
    train_sampler, *eval_samplers = create_samplers(config, dataset, parts)
    if whole_histories:
        train_data = SequenceDataLoader(config, parts[0], train_sampler, config["shuffle"])
    elif config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        negatives = config["train_neg_sample_args"]
        samplers = train_sampler, KGSampler(dataset, negatives["distribution"], negatives["alpha"])
        train_data = get_dataloader(config, "train")(config, parts[0], *samplers, shuffle=True)
    else:
        train_data = get_dataloader(config, "train")(config, parts[0], train_sampler, shuffle=config["shuffle"])
    eval_data = [
        get_dataloader(config, phase)(config, part, sampler, shuffle=False)
        for phase, part, sampler in zip(("valid", "test"), parts[1:], eval_samplers, strict=True)
    ]
    for title, keys in (
        ("Training", ("train_batch_size", "train_neg_sample_args")),
        ("Evaluation", ("eval_batch_size", "eval_args")),
    ):
        settings = (set_color(key, "cyan") + " = " + set_color(f"[{config[key]}]", "yellow") for key in keys)
        logging.getLogger().info(set_color(f"[{title}]: ", "pink") + " ".join(settings))
    return train_data, *eval_data


def _bound_scores(config, dataset) -> None:
    """Lower ``eval_batch_size`` to as many users as can have all items' scores at a time.

    RecBole does so for its other models; a sequential one would hold those of 4096 users, whatever the catalogue.
    """
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and "full" in config["eval_args"]["mode"].values():
        most = max(world_size(), SCORES_AT_A_TIME[config["device"].type == "cuda"] // dataset.item_num)
        config["eval_batch_size"] = min(config["eval_batch_size"], most)


def _tell_repeats(dataset) -> None:
    users, items = (np.asarray(dataset.inter_feat[field]) for field in (dataset.uid_field, dataset.iid_field))
    if repeats := len(users) - len(np.unique(users.astype(np.int64) * dataset.item_num + items)):
        logging.getLogger().warning(
            f"{repeats / len(users):.1%} of the interactions are with an item that the user had before, and with "
            "allow_repeats: False such an item is ranked last: set allow_repeats: True where they matter."
        )


def _check_exclusion(config, dataset) -> None:
    if not isinstance(dataset, SequenceDataset):
        raise UserError(
            f"exclude_history needs whole histories, which {config['model']} does not load as it is set: "
            "leave it out, or set train_mode: sequence where the model has it."
        )


def _check_sequence_mode(dataset) -> None:
    if not isinstance(dataset, SequenceDataset):
        raise UserError("train_mode: sequence needs one .inter file, not benchmark_filename; set train_mode: prefix.")
