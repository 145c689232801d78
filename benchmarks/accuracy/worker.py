"""One run of the study, in a process of its own: ``python -m benchmarks.accuracy.worker FOLDER``."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.parts import by_popularity, summary_of_parts
from benchmarks.accuracy.runs import Spec
from benchmarks.environment import environment
from benchmarks.speed.contenders import QUIET, hush
from recbole_ssm.analysis import Ranks, rank_targets
from recbole_ssm.config import Config
from recbole_ssm.models.starrec import STARRec
from recbole_ssm.quick_start import Run, config_of, load_data, load_data_and_model, train_and_test
from recbole_ssm.trainer import get_trainer

TOPK = (5, 10, 20, 50)

# The candidates that a target is ranked among. By one of them a run is tuned, and its best epoch chosen, on the
# validation set; its model is evaluated by all. The first is RecBole's, and the default.
FULL, UNSEEN = "all items", "history excluded"
PROTOCOLS: dict[str, dict[str, Any]] = {FULL: {}, UNSEEN: {"exclude_history": True}}


def main(folder: Path) -> None:
    """Make the run that ``task.json`` describes; leave ``row.json`` and ``ranks.npz``."""
    task, about = json.loads((folder / "task.json").read_text()), environment()
    del sys.argv[1:]  # RecBole reads settings from there
    os.chdir(folder)
    hush()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    spec = Spec(**task["spec"])
    full = Spec(spec.model, spec.dataset, spec.seed, task["settings"])
    config = full.config(task["data_path"], checkpoint_dir=str(folder))
    load_data(full.config(task["data_path"], **PROTOCOLS[UNSEEN]))  # what cannot be done is said before it trains
    curve = folder / "curve.jsonl"
    resume_file = _to_resume(folder, config, about)
    if resume_file is None:
        curve.unlink(missing_ok=True)
    run = train_and_test(config, resume_file=resume_file, callback_fn=_progress(spec, config, curve))
    found, model = _evaluations(run)
    row = {
        "id": task["id"],
        "model": spec.model,
        "dataset": spec.dataset,
        "seed": spec.seed,
        "settings": spec.settings,
        "command": spec.command(),
        "valid": {name: ranks.metrics(TOPK) for name, ranks in found["valid"].items()},
        "test": {name: ranks.metrics(TOPK) for name, ranks in found["test"].items()},
        "recbole_test_result": run.result["test_result"],
        **_training(run),
        "curve": _read_curve(curve),
        **model,
        "config": {key: value for key, value in run.config.given.items() if key not in ("data_path", "checkpoint_dir")},
        "environment": about,
    }
    _write_ranks(folder / "ranks.npz", found["test"])
    (folder / "row.json").write_text(json.dumps(row))
    print(f"{spec}: {_summary(row)}", flush=True)


def checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint that a run in this folder wrote last."""
    return max(folder.glob("*.pth"), key=lambda file: file.stat().st_mtime, default=None)


def _to_resume(folder: Path, config: Config, about: dict[str, Any]) -> str | None:
    """The checkpoint to go on from, if the same code on the same machine wrote it with the same settings."""
    begun, file = folder / "environment.json", checkpoint_in(folder)
    machine = about["device"].removesuffix(f", {about['threads']} threads")  # --jobs may differ
    same = {"device": machine, **{key: about[key] for key in ("versions", "commit")}}
    if file is not None:
        places = ("data_path", "checkpoint_dir")
        own, its = ({k: v for k, v in c.items() if k not in places} for c in (config.given, config_of(str(file)).given))
        if begun.exists() and json.loads(begun.read_text()) == same and own == its:
            return str(file)
        print(f"{folder.name}: begun by another commit, machine or settings; it starts anew", flush=True)
        for old in folder.glob("*.pth"):
            old.rename(old.with_suffix(".old"))
    begun.write_text(json.dumps(same))
    return None


def _progress(spec: Spec, config: Config, curve: Path):
    begin = time.perf_counter()
    first: int | None = None

    def tell(epoch: int, valid_score: float) -> None:
        nonlocal first
        first = epoch if first is None else first
        with curve.open("a") as file:
            file.write(json.dumps([epoch, valid_score]) + "\n")
        spent = (time.perf_counter() - begin) / 60
        left = spent / (epoch - first + 1) * (config["epochs"] - epoch - 1)
        print(
            f"{spec}: epoch {epoch + 1} of {config['epochs']}, valid {config['valid_metric']} {valid_score:.4f}, "
            f"{spent:.1f} min, at most {left:.0f} more",
            flush=True,
        )

    return tell


def _read_curve(file: Path) -> list[tuple[int, float]]:
    """Epochs and their validation scores; of an epoch that a killed run made twice the last one."""
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(dict(map(json.loads, lines)).items())


def _evaluations(run: Run) -> tuple[dict[str, dict[str, Ranks]], dict[str, Any]]:
    """Ranks under each protocol on both sets, and what is worth knowing of the model."""
    found: dict[str, dict[str, Ranks]] = {"valid": {}, "test": {}}
    for name, settings in PROTOCOLS.items():
        settings = {"exclude_history": False, **settings, **QUIET}
        config, model, _, train_data, valid_data, test_data = load_data_and_model(run.checkpoint, settings)
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        found["valid"][name] = rank_targets(trainer, valid_data)
        found["test"][name] = rank_targets(trainer, test_data)
    about: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps_per_epoch": len(train_data),
        "popularity": by_popularity(found["test"][FULL], train_data, test_data, TOPK),
    }
    if isinstance(model, STARRec):
        about["parts"] = summary_of_parts(model, test_data, Path(config["data_path"]))
    return found, about


def _training(run: Run) -> dict[str, Any]:
    """How long it took, and to what."""
    best = run.best_epoch or 0
    spent = run.timings
    epoch_s, eval_s = spent["train_seconds_per_epoch"] or 0.0, spent["eval_seconds"] or 0.0
    return {
        "best_valid_score": run.result["best_valid_score"],
        "epochs_to_best": best + 1,
        "seconds_to_best": (best + 1) * (epoch_s + eval_s),
        **spent,
    }


def _write_ranks(file: Path, found: dict[str, Ranks]) -> None:
    """Ranks as far as the largest k, 0 beyond it; users and their lengths are the same whatever the candidates."""
    some = next(iter(found.values()))
    held: dict[str, Any] = {"users": some.users.astype(np.int32), "lengths": some.lengths.astype(np.int32)}
    for name, part in found.items():
        held[name] = np.where(part.ranks <= max(TOPK), part.ranks, 0).astype(np.uint8)
    np.savez_compressed(file, **held)


def _summary(row: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {found['ndcg@10']:.4f}" for name, found in row["test"].items())
    return f"test NDCG@10 {scores}; best epoch {row['epochs_to_best']}, {row['seconds_to_best'] / 60:.1f} min"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
