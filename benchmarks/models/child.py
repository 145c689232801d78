"""One process of ``python -m benchmarks models``: runs models one after the other and writes a line for each.

It is a script, which imports nothing of this repository where RecBole itself is to run, perhaps in an old environment.
"""

import functools
import json
import sys
import time
import traceback
import warnings
from pathlib import Path


def recbole_alone():
    """RecBole's ``run_recbole``, whose checkpoints torch has not loaded since 2.6 unless it is told to."""
    import torch
    from recbole.quick_start import run_recbole

    torch.load = functools.partial(torch.load, weights_only=False)
    return run_recbole


def recbole_ssm():
    """This package's."""
    from recbole_ssm import run_recbole

    return run_recbole


def newest(pattern):
    """The file that the stage before has left."""
    return str(max(Path("saved").glob(pattern), key=lambda file: file.stat().st_mtime))


def run_stages(run_recbole, model, dataset, stages):
    """Train and test; of stages that hand a file on (``{"pre_model_path": "<pattern>"}``) the last one counts."""
    for stage in stages:
        settings = dict(stage)
        for key in ("pre_model_path", "warm_up"):
            if key in settings:
                settings[key] = newest(settings[key])
        result = run_recbole(model=model, dataset=dataset, config_dict=settings)
    return {name: float(value) for part in ("best_valid_result", "test_result")
            for name, value in prefixed(part.split("_")[-2], result[part])}  # fmt: skip


def prefixed(part, metrics):
    """Metrics of the validation or the test set by names that say of which."""
    return [(f"{part} {name}", value) for name, value in (metrics or {}).items()]


def main():
    """Read the job from the first argument, and write lines of JSON to the file that the second names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    output = Path(sys.argv[2])
    sys.argv = sys.argv[:1]  # RecBole reads the command line
    warnings.simplefilter("ignore")
    run_recbole = recbole_alone() if job["alone"] else recbole_ssm()
    for model, stages in job["models"].items():
        begin = time.perf_counter()
        try:
            line = {"metrics": run_stages(run_recbole, model, job["dataset"], stages)}
        except (Exception, SystemExit) as error:
            print(f"--- {model}", file=sys.stderr)
            traceback.print_exc()
            line = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        line["seconds"] = time.perf_counter() - begin
        with output.open("a") as lines:
            lines.write(json.dumps({"model": model, **line}) + "\n")
        print(model, line, flush=True)


if __name__ == "__main__":
    main()
