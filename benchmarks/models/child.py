"""One process of ``python -m benchmarks models``: runs models one after the other and writes a line for each.

It is a script, which imports nothing of this repository where RecBole itself is to run, perhaps in an old environment.
"""

import functools
import json
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("recbole", "torch", "numpy", "pandas", "scipy")


def recbole_alone():
    """RecBole's ``run_recbole``, whose checkpoints torch has not loaded since 2.6 unless it is told to."""
    import torch
    from recbole.quick_start import run_recbole

    torch.load = functools.partial(torch.load, weights_only=False)
    return run_recbole


def recbole_ssm(fused):
    """This package's, with or without fused steps of the optimizer."""
    import recbole_ssm.trainer

    if not fused:
        vars(recbole_ssm.trainer)["FUSED_OPTIMIZERS"] = ()
    return recbole_ssm.run_recbole


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
    parts = {"valid": result["best_valid_result"], "test": result["test_result"]}
    return {f"{part} {name}": float(value) for part, metrics in parts.items() for name, value in metrics.items()}


def write(output, **line):
    """Append a line of JSON."""
    with output.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def main():
    """Read the job from the first argument, and write lines of JSON to the file that the second names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    output = Path(sys.argv[2])
    sys.argv = sys.argv[:1]  # RecBole reads the command line
    warnings.simplefilter("ignore")
    run_recbole = recbole_alone() if job["alone"] else recbole_ssm(job["fused"])
    write(output, versions={package: version(package) for package in PACKAGES})
    for model, stages in job["models"].items():
        begin = time.perf_counter()
        try:
            line = {"metrics": run_stages(run_recbole, model, job["dataset"], stages)}
        except (Exception, SystemExit) as error:
            print(f"--- {model}", file=sys.stderr)
            traceback.print_exc()
            line = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        line["seconds"] = time.perf_counter() - begin
        write(output, model=model, **line)
        print(model, line, flush=True)


if __name__ == "__main__":
    main()
