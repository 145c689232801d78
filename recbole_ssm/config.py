"""RecBole's configuration with this package's property files, strict about the settings of our models."""

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import recbole.config
import recbole.trainer
import torch
import yaml
from recbole.utils import InputType, ModelType, get_trainer

from recbole_ssm.data.context import columns_of
from recbole_ssm.distributed import meet_on_this_machine
from recbole_ssm.errors import UserError
from recbole_ssm.registry import MODELS, list_models
from recbole_ssm.settings import CAUSAL_MODELS, NEGATIVES, SCHEMAS, check, fixed, near, schema_of, unread
from recbole_ssm.settings.text import own
from recbole_ssm.settings.values import PlainLoader, is_name, literal, native, plain, printable, read_settings

# Options of our commands, which RecBole's configuration meets in sys.argv and must leave alone.
COMMAND_OPTIONS = {
    "config_files", "nproc", "ip", "port", "world_size", "group_offset",
    "list_models", "checkpoint", "mode", "resume", "result_file", "engine", "doctor", "force",
    "params_file", "output_file", "display_file", "tool", "address", "scheduler", "search_alg", "num_samples",
    "max_concurrent", "cpus_per_trial", "gpus_per_trial", "time_budget", "storage_path", "name",
}  # fmt: skip

# Of one process among several.
PROCESS = {"local_rank", "offset", "nproc", "world_size", "ip", "port", "rendezvous"}

# Settings that RecBole reads although none of its property files of sequential models lists them.
UNLISTED = {*PROCESS, "model", "dataset", "encoding", "device", "tuned", "single_spec", "tail_ratio"}

# Names of RecBole's that nothing reads any more, and what is read instead.
REPLACED = {
    "config_file": "--config_files (in Python config_file_list)", "neg_sampling": "train_neg_sample_args",
    "training_neg_sample_num": "train_neg_sample_args",
}  # fmt: skip

# What a checkpoint leaves out: it belongs to one process or machine, or RecBole derives it.
PROCESS_SETTINGS = {*PROCESS, "MODEL_TYPE", "gpu_id"}

# Settings of a checkpoint that are not followed: they name files or services, which are the user's own.
# The data's folder is, for from there words and numbers alone are read.
FILE_SETTINGS = {
    "checkpoint_dir", "config_file", "save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path",
    "pre_model_path", "pretrain_path", "mf_pretrain_path", "mlp_pretrain_path", "warm_up", "log_wandb", "wandb_project",
}  # fmt: skip

SEQUENTIAL_EVALUATION = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}

SAMPLE_LOAD_COL = {"inter": ["user_id", "item_id"]}


def properties_dir() -> Path:
    """Folder of the property files: inside the package in a wheel, beside it in a checkout.

    Raises:
        FileNotFoundError: where an installation lacks them.
    """
    package = Path(__file__).parent
    for folder in (package / "properties", package.parent / "properties"):
        if (folder / "model" / "STARRec.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no property files beside {package}: install recbole-ssm again")


def tuned_file(model: str, dataset: str, exclude_history: bool = False) -> Path:
    """Where the settings that tuning finds for a model on a set are written.

    Args:
        model: model name.
        dataset: dataset name.
        exclude_history: for which of the two evaluations they are found.
    """
    which = "history_excluded-" if exclude_history else ""
    return properties_dir() / "tuned" / f"{dataset}-{which}{model}.yaml"


def tuned_for(model: str, dataset: str, exclude_history: bool = False) -> Path | None:
    """The :func:`tuned_file` that is read: where there is none for the excluded history, that of all items."""
    files = (tuned_file(model, dataset, excluded) for excluded in dict.fromkeys((exclude_history, False)))
    return next((file for file in files if file.is_file()), None)


def tuned_settings(model: str, dataset: str, exclude_history: bool = False) -> dict[str, Any]:
    """The content of :func:`tuned_for`, empty where there is none."""
    file = tuned_for(model, dataset, exclude_history)
    return {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8"))


class Config(recbole.config.Config):
    """:class:`recbole.config.Config` that also reads this package's ``properties/``.

    Precedence is RecBole's: overall < model < dataset < config files < dict < command line. Of a sequential model,
    ours or RecBole's, the dataset properties found here are used, above them what tuning found for the two together
    (unless ``tuned`` is False), the columns to load default to user, item and time, and ``train_neg_sample_args``
    defaults to what ``loss_type`` needs. For our own models a key that nothing reads is refused.

    Attributes:
        property_files: this package's files that it read.
        given: every setting before RecBole derives others from them, plain values only; building a ``Config`` from it
            gives the same configuration again.
        identity: a checkpoint's vocabularies, which data are to be numbered by, and its ``file``; empty where there is
            none.
        doubts: sentences about settings that perhaps nothing reads.

    Raises:
        UserError: for an unknown model, key or value, with what to write instead.
    """

    identity: dict[str, Any] = {}  # noqa: RUF012
    given_twice: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, model=None, dataset=None, config_file_list=None, config_dict=None):
        self.doubts = []
        if isinstance(config_file_list, str | Path):
            raise UserError(f"config_file_list is {str(config_file_list)!r}: give a list of files.")
        try:
            super().__init__(model, dataset, config_file_list, copy.deepcopy(config_dict))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, NotImplementedError, RuntimeError, OSError, yaml.YAMLError) as error:
            message = error.args[0] if isinstance(error, KeyError) else error
            raise UserError(f"the configuration cannot be used: {message}") from error

    @classmethod
    def rebuild(cls, given: dict[str, Any], settings: dict[str, Any] | None = None) -> "Config":
        """The configuration that had this :attr:`given`, with ``settings`` above it and nothing else.

        Property files as they are now are below it, and the command line is not read: what a checkpoint was trained
        with stays as it was. Files that it names (:data:`FILE_SETTINGS`) and its GPU are left to ``settings``.

        Raises:
            UserError: where ``settings`` would make another model of the one that was trained.
        """
        changes = {key: literal(value) if isinstance(value, str) else value for key, value in (settings or {}).items()}
        for key in sorted(fixed() & changes.keys() & given.keys()):
            if changes[key] != given[key]:
                raise UserError(
                    f"{key} is {given[key]!r} in the checkpoint's model, which is not the same model with "
                    f"{changes[key]!r}: leave it out, or train again."
                )
        given = {key: value for key, value in given.items() if key not in FILE_SETTINGS | PROCESS_SETTINGS}
        if isinstance(changes.get("eval_args"), dict) and isinstance(given.get("eval_args"), dict):
            changes["eval_args"] = {**given["eval_args"], **changes["eval_args"]}
        if "loss_type" in changes and changes["loss_type"] != given.get("loss_type"):
            given.pop("train_neg_sample_args", None)
        config = _RebuiltConfig(config_dict={**given, **changes})
        config._refuse_unread(changes)
        return config

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Config":
        """The configuration of ``model``, ``dataset`` and what else is in ``settings``, without the command line."""
        return _SettingsConfig(config_dict=settings)

    def compatibility_settings(self):
        """Names that RecBole uses and NumPy 2 removed; RecBole sets these itself, from names that are gone too."""
        aliases = {"bool": np.bool_, "int": np.int_, "float": np.float64, "complex": np.complex128}
        aliases |= {"object": np.object_, "str": np.str_, "long": np.int_, "unicode": np.str_}
        for name, value in aliases.items():
            if name not in np.__dict__:
                setattr(np, name, value)

    def _convert_config_dict(self, config_dict):
        """As RecBole's for literals, without evaluating anything else: a setting may come from a stranger's file."""
        for key, value in config_dict.items():
            if isinstance(value, str):
                config_dict[key] = literal(value)
        return config_dict

    def _build_yaml_loader(self):
        """As RecBole's, which also makes some of Python's own objects."""
        PlainLoader.yaml_implicit_resolvers = super()._build_yaml_loader().yaml_implicit_resolvers
        return PlainLoader

    def _load_config_files(self, file_list):
        settings = {}
        for file in file_list or []:
            settings.update(read_settings(file, self.yaml_loader))
        return settings

    def _load_cmd_line(self):
        """``--key=value`` words of the command line; a script's other words are its own."""
        settings: dict[str, str] = {}
        self.given_twice = {}
        for word in [] if "ipykernel_launcher" in sys.argv[0] else sys.argv[1:]:
            key, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or not equals or key in COMMAND_OPTIONS:
                continue
            if settings.setdefault(key, value) != value:
                self.given_twice[key] = f"--{key} is given twice, as {settings[key]} and as {value}."
        return self._convert_config_dict(settings)

    def __str__(self):
        """As RecBole's, each setting on a line of its own whatever it holds."""
        shown = copy.copy(self)
        shown.final_config_dict = {key: printable(value) for key, value in self.final_config_dict.items()}
        return super(Config, shown).__str__()

    def _get_model_and_dataset(self, model, dataset):
        found = self._find_model_and_dataset(model, dataset)
        if not is_name(found[2]):
            raise UserError(f"{found[2]!r} is no name of a dataset: give its folder's parent as --data_path.")
        return found

    def _find_model_and_dataset(self, model, dataset):
        try:
            return super()._get_model_and_dataset(model, dataset)
        except (ValueError, AttributeError, ModuleNotFoundError) as error:
            name = model or self.external_config_dict["model"]
            if name in list_models():
                absent = isinstance(error, ModuleNotFoundError) and error.name
                remedy = f" Install it: pip install {absent}" if absent else ""
                raise UserError(f"model {name} cannot be loaded: {error}.{remedy}") from error
            raise UserError(f"unknown model {name!r}{near(name, list_models())} --list_models names all.") from error

    def _load_internal_config_dict(self, model, model_class, dataset):
        super()._load_internal_config_dict(model, model_class, dataset)
        root = properties_dir()
        files = []
        if model in MODELS:
            files += [root / "overall.yaml", root / "model" / f"{model}.yaml"]
        if model_class.type == ModelType.SEQUENTIAL:
            if self.internal_config_dict["eval_args"]["order"] != "TO":  # of GRU4RecKG and KSR, which RecBole forgot
                self.internal_config_dict["eval_args"] = copy.deepcopy(SEQUENTIAL_EVALUATION)
            files += [root / "dataset" / f"{dataset}.yaml"]
            asked = self.external_config_dict
            if self._wants_tuned() and (tuned := tuned_for(model, dataset, asked.get("exclude_history") is True)):
                files.append(tuned)
        load_col = self.internal_config_dict["load_col"]
        self.property_files = [file for file in files if file.is_file()]
        for file in self.property_files:
            self._update_internal_config_dict(file)
            if file == root / "overall.yaml":  # those of another package's model stand in no file here
                self.internal_config_dict |= {key: SCHEMAS[model].model_fields[key].default for key in own(model)}
        if set(load_col or {}) - {"inter"}:  # RecBole knows that this model needs more than interactions
            self.internal_config_dict["load_col"] = load_col
        self._refuse_unknown_keys()

    def _wants_tuned(self) -> bool:
        return self.external_config_dict.get("tuned", True)

    def _refuse_unknown_keys(self):
        known = set(self.internal_config_dict) | UNLISTED
        if self.model not in MODELS and self.model in SCHEMAS:
            known.update(SCHEMAS[self.model].model_fields)
        known.update(*self.parameters.values())
        for key, sentence in self.given_twice.items():
            if key in known:
                raise UserError(sentence)
        for key in REPLACED.keys() & self.external_config_dict.keys():
            raise UserError(f"nothing reads {key}: write {REPLACED[key]}.")
        for key in [key for key in self.external_config_dict if key not in known]:
            if self.model not in MODELS:
                # RecBole's models may read settings that no property file names.
                hint = near(key, sorted(known)).removesuffix(".")
                self.doubts.append(f"{key} stands in no property file of {self.model}: perhaps nothing reads it{hint}")
                logging.getLogger().warning(self.doubts[-1])
                continue
            if key in self.file_config_dict or key in self.variable_config_dict:
                raise UserError(f"unknown setting {key!r}{near(key, sorted(known))}")
            # Only in sys.argv: of run_recbole this is refused by the command itself, else it is a script's own flag.
            logging.getLogger().warning(f"--{key} is no setting of this model; it is left to the script")
            del self.external_config_dict[key]

    def _get_final_config_dict(self):
        final = super()._get_final_config_dict()
        final = {key: native(value) for key, value in final.items()}
        if final["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            self._complete_data(final)
            self._complete_loss(final)
        if final.get("train_mode") == "sequence":
            # Of RecBole's models; ours have them in overall.yaml.
            final.setdefault("time_order", "exact")
            final.setdefault("cuda_graphs", "auto")
        if isinstance(final.get("cuda_graphs"), bool):  # as YAML reads on and off
            final["cuda_graphs"] = "on" if final["cuda_graphs"] else "off"
        self._check(final)
        self.given = {key: plain(value) for key, value in final.items() if key not in PROCESS_SETTINGS}
        self.given |= {"model": self.model, "dataset": self.dataset}
        if not final["use_gpu"]:
            final["gpu_id"] = ""  # by which alone RecBole chooses the device
        return final

    def _complete_data(self, final: dict[str, Any]) -> None:
        """Load the columns that a sequential model reads, and keep to its split."""
        if final["load_col"] == SAMPLE_LOAD_COL and "load_col" not in self.external_config_dict:
            fields = ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")
            final["load_col"] = {"inter": [final[field] for field in fields]}
        for setting in ("item_features", "selected_features"):  # the second is that of RecBole's own models
            if isinstance(final.get(setting), list) and isinstance(final["load_col"], dict):
                loaded = final["load_col"].get("item", [])
                if isinstance(loaded, list):
                    loaded = list(dict.fromkeys([final["ITEM_ID_FIELD"], *loaded, *final[setting]]))
                final["load_col"] = {**final["load_col"], "item": loaded}
        # RecBole would complete it for a random split, which no sequential model can be evaluated by.
        if isinstance(final["eval_args"], dict):
            final["eval_args"] = {**self.internal_config_dict["eval_args"], **final["eval_args"]}

    def _complete_loss(self, final: dict[str, Any]) -> None:
        """Let what follows from the loss follow from the final one, where nobody asked for anything else."""
        # Not what a property file says, for it may have been written for another loss; SINE wants pairs with any.
        by_loss = getattr(self.model_class, "input_type", None) != InputType.PAIRWISE
        by_loss &= str(final.get("loss_type")) in NEGATIVES
        if by_loss and "train_neg_sample_args" not in self.external_config_dict:
            final["train_neg_sample_args"] = copy.deepcopy(NEGATIVES[final["loss_type"]])
        # Nor is an item left out of a loss that does not know how.
        softmax = final.get("loss_type") == "CE" and not final.get("label_smoothing")
        if final.get("allow_repeats") is False and not softmax and "allow_repeats" not in self.external_config_dict:
            final["allow_repeats"] = True

    def _check(self, final: dict[str, Any]) -> None:
        """Hold the settings to the schema, before anything is loaded by them."""
        if self.model not in MODELS and final.get("train_mode") == "sequence" and self.model not in CAUSAL_MODELS:
            raise UserError(
                f"{self.model} cannot be trained on whole histories (train_mode: sequence): of RecBole's models "
                f"{', '.join(CAUSAL_MODELS[:-1])} and {CAUSAL_MODELS[-1]} can. Leave --train_mode out."
            )
        sequential = final["MODEL_TYPE"] == ModelType.SEQUENTIAL
        own_trainer = get_trainer(final["MODEL_TYPE"], self.model) is not recbole.trainer.Trainer
        self.schema = schema_of(self.model, self.model in MODELS, sequential, own_trainer)
        self._refuse_unread(self._asked_for())
        check(self.schema, {**final, "model": self.model})
        columns_of(self.model_class, final)
        if self.model in MODELS:
            return
        input_type, negatives = getattr(self.model_class, "input_type", None), final["train_neg_sample_args"]
        if input_type is None and final["loss_type"] not in ("CE", "BPR"):
            raise UserError(f"loss_type is {final['loss_type']!r}: choose one of CE, BPR, as {self.model} has.")
        drawn = negatives.get("distribution", "uniform") if isinstance(negatives, dict) else None
        if input_type == InputType.PAIRWISE and drawn in (None, "none", "None"):
            raise UserError(f"{self.model} compares items with negatives: leave train_neg_sample_args out.")

    def _asked_for(self) -> dict[str, Any]:
        return self.external_config_dict

    def _refuse_unread(self, given: dict[str, Any]) -> None:
        """Refuse settings that nobody would look at."""
        for key in unread(self.schema, given):
            if key not in self.internal_config_dict:
                raise UserError(f"{self.model} reads no {key}: leave it out.")
        # Each makes columns, which only a model reads that was written for them.
        made = self.internal_config_dict["transform"]
        if given.get("transform", made) != made and self.model in list_models():
            wanted = f"transform {made} alone" if made else "no transform"
            raise UserError(f"transform is {given['transform']!r}, but {self.model} reads {wanted}: leave it out.")

    def _init_device(self):
        """As RecBole's for one process; one of several joins the others, on a CPU as well."""
        final = self.final_config_dict
        rank = final.get("local_rank")
        if rank is None:
            super()._init_device()
            return
        del final["local_rank"]  # to RecBole each process is one alone
        super()._init_device()
        final["local_rank"] = rank
        if final["device"].type == "cuda":
            final["device"] = torch.device("cuda", rank)
            torch.cuda.set_device(rank)
        if rank + final["offset"]:
            final |= {"state": "error", "show_progress": False, "log_wandb": False}
        if not torch.distributed.is_initialized():
            backend = "nccl" if final["device"].type == "cuda" else "gloo"
            number = {"rank": rank + final["offset"], "world_size": final["world_size"]}
            if "rendezvous" in final:
                meet_on_this_machine(backend, final["rendezvous"], **number)
            else:
                where = f"tcp://{final['ip']}:{final['port']}"
                torch.distributed.init_process_group(backend, init_method=where, **number)

    def _set_default_parameters(self):
        super()._set_default_parameters()
        final = self.final_config_dict
        if self.model in MODELS and final["loss_type"] != "CE":
            final["MODEL_INPUT_TYPE"] = InputType.PAIRWISE


class _SettingsConfig(Config):
    def _load_cmd_line(self):
        return {}


class _RebuiltConfig(_SettingsConfig):
    def _refuse_unknown_keys(self):
        if self.model in MODELS:
            super()._refuse_unknown_keys()

    def _wants_tuned(self):
        return False  # what a file says now may not be what the run was started with

    def _load_variable_config_dict(self, config_dict):
        return config_dict

    def _asked_for(self):
        return {}  # what a run was started with is as it was, but for what rebuild changes
