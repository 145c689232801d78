"""What runs on this machine: one table, which belongs into every bug report.

Each op that a model needs, on each backend and in each dtype, is checked beside the reference as before its first use
(:mod:`recbole_ssm.ops.self_check`), and timed where it is right.
"""

import platform
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import yaml

from recbole_ssm.config import properties_dir
from recbole_ssm.ops import self_check
from recbole_ssm.ops.backend import BACKENDS, is_checked, preferred, tf32_allowed, why_not
from recbole_ssm.ops.self_check import Check, Verdict, verdicts

MAIN_JOB = "STARRec"
MODELS = (MAIN_JOB, "Mamba4Rec", "SSD4Rec", "RecBLR")  # of the table
OTHERS = ("TiM4Rec", "SS4Rec")
DTYPES = ("float32", "bfloat16")
PACKAGES = ("recbole-ssm", "recbole", *self_check.PACKAGES)

# The ops that ssm_backend is for.
NAMED = ("selective_scan", "ssd", "causal_conv")

# Nobody waits for training meanwhile, and on a CPU the reference takes its time.
LIMIT_S = 60.0

WIDTH = 100
COLUMNS = (21, 20, 10, 9)  # op, sizes, backend, dtype; the verdict takes the rest


class Need(NamedTuple):
    """An op that a model calls.

    Attributes:
        op: its name.
        sizes: its widths, by the letters of its docstring.
        exact: whether it is called in float32 where the model is trained in half precision, too.
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    exact: bool = False

    @classmethod
    def of(cls, op: str, exact: bool = False, **sizes: int) -> "Need":
        """One whose ``sizes`` are keywords."""
        return cls(op, tuple(sizes.items()), exact)


def needs(model: str, settings: Mapping[str, Any]) -> list[Need]:
    """Ops, each with its sizes, that a model calls when it trains and is evaluated; none for a model not known here.

    Args:
        model: its name.
        settings: its configuration.
    """
    if model not in (*MODELS, *OTHERS):
        return []
    size = settings["hidden_size"]
    found: list[Need] = []
    if model == "RecBLR":
        units = settings["expand"] * size
        found.append(Need.of("causal_conv", D=units, K=settings["d_conv"]))
        found.append(Need.of("selective_scan", exact=True, D=units, N=1))
    elif model != "STARRec" or settings["use_ssm"]:
        block = {"SSD4Rec": "mamba2", "TiM4Rec": "mamba2", "SS4Rec": "mamba"}.get(model) or settings["ssm_block"]
        found += _needs_of_block(block, settings)
    if model in ("STARRec", "Mamba4Rec") and settings["filter_share"]:
        found.append(Need.of("selective_scan", exact=True, D=size, N=1))
    both_ways = model == "SSD4Rec" and settings["bidirectional"] and settings["backward_stream"] == "final"
    if both_ways and settings["train_mode"] == "sequence":  # all prefixes are read in reverse at once
        taps, inner = settings["d_conv"], settings["expand"] * size
        found.append(Need.of("causal_conv", D=taps * (inner + 2 * settings["d_state"]), K=taps))
        found.append(Need.of("ssd", exact=True, H=inner // settings["headdim"], P=1, G=1, N=1))
    if model == "TiM4Rec" and settings["time_aware"]:
        heads = settings["expand"] * size // settings["headdim"]
        found.append(Need.of("causal_conv", D=heads, K=settings["d_conv"]))
    if model == "SS4Rec":
        found.append(Need.of("selective_scan", exact=True, D=2 * settings["d_time_state"], N=1))
    if model == "STARRec" and settings["use_pma"]:
        heads = settings["n_heads"]
        metrics = {"M": heads, "E": size} if settings["use_similarity"] else {"M": 1, "E": 1}
        if settings["use_similarity"]:  # of embeddings, which autocast leaves alone
            found.append(Need.of("preference_features", exact=True, H=heads, E=size))
        window = {"window": settings["attention_window"]} if settings["attention_window"] else {}
        found.append(Need.of("preference_attention", H=heads, P=size // heads, **metrics, **window))
    if model == "STARRec" and settings["use_moe"] and settings["diversity_weight"]:
        found.append(Need.of("expert_diversity", K=settings["experts_per_token"] or settings["n_experts"], E=size))
    return found


def _needs_of_block(block: str, settings: Mapping[str, Any]) -> list[Need]:
    inner, states, taps = settings["expand"] * settings["hidden_size"], settings["d_state"], settings["d_conv"]
    if block == "mamba":
        return [Need.of("causal_conv", D=inner, K=taps), Need.of("selective_scan", D=inner, N=states)]
    heads = inner // settings["headdim"]
    ssd = {"H": heads, "P": settings["headdim"]}
    if block == "mamba2":
        return [Need.of("causal_conv", D=inner + 2 * states, K=taps), Need.of("ssd", **ssd, G=1, N=states)]
    return [
        Need.of("selective_scan", exact=True, D=heads * (states // 4), N=1),
        Need.of("ssd", exact=True, **ssd, G=heads, N=states),
    ]


def prefetch(config: Any) -> None:
    """On a GPU, check all that a model needs side by side, before its first step asks for one after the other.

    Args:
        config: the model's configuration.
    """
    device = torch.device(config["device"])
    if not is_checked(device):
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    half = "bfloat16" if device.type != "cuda" or torch.cuda.is_bf16_supported() else "float16"
    dtype = half if config["enable_amp"] else "float32"
    named = config["ssm_backend"] not in (None, "auto")
    checks = []
    for op, sizes, exact in needs(config["model"], config):
        if named and op in NAMED:
            continue
        taken = "float32" if exact else dtype
        able = [backend for backend in preferred(device) if not why_not(op, backend, probe(device, taken))]
        checks += [Check(op, first, str(device), taken, sizes, tf32=tf32_allowed(device)) for first in able[:1]]
    verdicts(checks)


def probe(device: torch.device, dtype: str = "float32") -> torch.Tensor:
    """A tensor to ask :func:`why_not` about."""
    return torch.empty(0, dtype=getattr(torch, dtype), device=device)


def default_needs(model: str) -> list[Need]:
    """The :func:`needs` of a model as its property file has it."""
    return needs(model, yaml.safe_load((properties_dir() / "model" / f"{model}.yaml").read_text(encoding="utf-8")))


def diagnose(anew: bool = False) -> int:
    """Print the table.

    Args:
        anew: check again what has been checked before.

    Returns:
        0 where the main job can run on this machine, else 1.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tried = [b for b in BACKENDS[1:] if b != "cpu" or device.type == "cpu"]
    ops = list(dict.fromkeys(need[:2] for model in MODELS for need in default_needs(model)))
    absent = {
        (op, b): why_not(op, b, probe(device)).removesuffix("; use ssm_backend: auto") for op, _ in ops for b in tried
    }

    def check(op: str, sizes: tuple[tuple[str, int], ...], backend: str, dtype: str) -> Check:
        return Check(op, backend, str(device), dtype, sizes, tf32=tf32_allowed(device))

    checks = [check(op, sizes, b, dtype) for op, sizes in ops for b in tried if not absent[op, b] for dtype in DTYPES]
    found = verdicts(checks, LIMIT_S, timed=True, anew=anew)

    for name, text in about(device).items():
        _row([name], text, COLUMNS[:1])
    print()
    _row(["op", "sizes", "backend", "dtype"], "verdict, and how many times as fast as the reference")
    for op, sizes in ops:
        label = [op, " ".join(f"{letter} {size}" for letter, size in sizes)]
        for backend in tried:
            if absent[op, backend]:
                _row([*label, backend, "all"], absent[op, backend])
                label = ["", ""]
            else:
                for dtype in DTYPES:
                    _row([*label, backend, dtype], _cell(found[check(op, sizes, backend, dtype)]))
                    label = ["", ""]
    print()

    taken, failed = {}, []
    for op, sizes, _ in default_needs(MAIN_JOB):
        ways = [b for b in (*preferred(device), "reference") if not absent[op, b]]
        if not is_checked(device):
            ways = ways[:1]
        right = [b for b in ways if found[check(op, sizes, b, "float32")].state == "right"]
        if right:
            taken[op] = right[0]
        else:
            failed.append(op)
    if failed:
        print(_wrapped(f"The main job ({MAIN_JOB}) cannot run here: {', '.join(failed)} has no backend that is right."))
        return 1
    print(
        _wrapped(f"The main job ({MAIN_JOB}) runs here: " + ", ".join(f"{op} on {b}" for op, b in taken.items()) + ".")
    )
    return 0


def about(device: torch.device) -> dict[str, str]:
    """The machine and the versions, by name."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        without = ""
    else:
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        without = f"; no GPU that torch can use (it is {built_for})"
    hardware = dict(self_check.hardware(str(device)))
    return {
        "device": hardware.pop("device") + without,
        **hardware,
        "memory": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda or torch.version.hip or "none",
        **{name: self_check.package_version(name) for name in PACKAGES},
        "kernels": self_check.kernels_digest(),
        "verdicts kept in": _from_home(self_check.cache_folder()),
    }


def _from_home(folder: Path) -> str:
    try:
        return f"~/{folder.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return str(folder)


def _cell(found: Verdict) -> str:
    if found.times_as_fast is None or found.times_as_fast == 1.0:
        return str(found)
    return f"{found}, {found.times_as_fast:.2g} times as fast"


def _row(cells: list[str], last: str, columns: tuple[int, ...] = COLUMNS) -> None:
    """Print cells, and after them ``last`` on as many lines as it needs."""
    indent = sum(columns)
    lines = textwrap.wrap(last, WIDTH - indent, break_long_words=False, break_on_hyphens=False) or [""]
    print(("".join(cell.ljust(width) for cell, width in zip(cells, columns, strict=True)) + lines[0]).rstrip())
    for line in lines[1:]:
        print(" " * indent + line)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)
