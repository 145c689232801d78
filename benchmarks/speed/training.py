"""Training: targets a second, through each trainer's own code path, loading included."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

from benchmarks.peers.client import RECTOOLS, REPLAY, Peer
from benchmarks.speed.authors import released_ssd4rec
from benchmarks.speed.batches import LADDERS, PROTOCOL, best_batch, choose_steps, of_round, searched
from benchmarks.speed.contenders import RECBOLE, Steps, build, contender, on_cuda, ratios, recorded, spread

AS_SHIPPED = f"{RECBOLE}, anomaly detection on"
# Whose rates are the units of the ratios, as far as they take part.
UNITS = (RECTOOLS.contender, REPLAY.contender, RECBOLE)
SECONDS_A_ROUND = 1.0


def measure(arguments: Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rates of all contenders, each with its own best batch, who take turns in every round."""
    cuda = on_cuda(arguments)
    contenders = build(arguments)
    if arguments.authors_ssd4rec:
        contenders = chain(contenders, [released_ssd4rec(arguments, arguments.authors_ssd4rec)])
    ours = {each.name: Steps(each) for each in contenders}
    recboles = ours[RECBOLE].contender
    with ExitStack() as stack:
        peers = _peers(arguments, recboles.config, cuda, stack)
        steps: dict[str, Peer | Steps] = {**peers, **ours}
        tried = {name: _search(arguments, name, step, cuda) for name, step in steps.items()}
        # RecBole's look-up of any sequential model imports all, and SINE switches anomaly detection on.
        shipped = {AS_SHIPPED: Steps(recboles, anomaly_detection=True)}
        steps = {**peers, RECBOLE: steps.pop(RECBOLE), **shipped, **steps}
        for name, step in steps.items():
            choose_steps(step, SECONDS_A_ROUND)
            print(f"training, {name}: {step.steps} steps a round", flush=True)
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.rounds):
            for name, step in steps.items():
                rates[name].append(of_round(step))
        compared = {unit: ratios(rates, unit) for unit in UNITS if unit in rates}
        rows = []
        for name, step in steps.items():
            taken_steps, step.steps = step.steps, 1
            rows.append({
                "contender": name,
                **(_of_peer(step, recboles.config) if isinstance(step, Peer) else step.contender.settings()),
                "batch_of": step.unit,
                "targets_per_s": spread(rates[name]),
                "ratio": {unit: found[name] for unit, found in compared.items()},
                "epoch_s": recboles.num_targets / spread(rates[name])["median"],
                "steps_a_round": taken_steps,
                "peak_bytes": step.peak(),
                "search": searched(tried.get(name, {})),
            })  # fmt: skip
            print(f"training, {name}: {rows[-1]['targets_per_s']['median']:.4g} targets a second", flush=True)
        versions = {peer.package.contender: f"{peer.versions['version']} (torch {peer.versions['torch']})"
                    for peer in peers.values()}  # fmt: skip
    yield {
        "settings": recorded(recboles.config, arguments.dataset) | versions,
        "protocol": {
            "timing": f"median of {arguments.rounds} rounds, every contender once a round for about "
            f"{SECONDS_A_ROUND:g} s or one step if that takes longer; ratios are medians over rounds",
            "step": "the trainer's own loop on the loader's next batches: loading, forward, backward, Adam",
            "targets": "positions that the loss predicts; an epoch is all of the training set's at that rate",
            "batch": PROTOCOL,
            "RecTools, RePlay": "each in an environment and a process of its own, by its own Lightning loop; SASRec "
            "as wide and deep as RecBole's, softmax over all items, on the training histories that ours reads, of "
            "each of which they take the latest 200 targets; RecTools' feed-forward layers are as wide as the model, "
            "a quarter of RecBole's and RePlay's",
            "memory": "one step's peak above what was held before it: the allocator's on a GPU, the process's on a CPU",
            "anomaly detection": "off for all but the row that names it; RecBole's own get_model switches it on",
        },
        "rows": rows,
    }


def _peers(arguments: Namespace, config: Any, cuda: bool, stack: ExitStack) -> dict[str, Peer]:
    wanted = {RECTOOLS: arguments.rectools, REPLAY: arguments.replay}
    if not any(wanted.values()):
        return {}
    train_data = contender(arguments, "SASRec").train_data
    peers = {}
    for package, python in wanted.items():
        if python:
            print(f"starting {package.contender}", flush=True)
            peers[package.contender] = stack.enter_context(Peer(package, python, config, train_data, cuda))
    return peers


def _search(arguments: Namespace, name: str, step: Peer | Steps, cuda: bool) -> dict[int, float]:
    """Find its best batch, and print what was tried; ours and RecBole's keep to one that is among the settings."""
    ladder = LADDERS[step.unit]
    if isinstance(step, Steps) and "train_batch_size" in arguments.settings:
        ladder = [step.contender.config["train_batch_size"]]
    rates = best_batch(step, ladder, cuda)
    table = ", ".join(f"{batch}: {rate:.4g}" for batch, rate in rates.items())
    print(f"training, {name}: targets a second by {step.unit} a step: {table or ladder[0]}", flush=True)
    return rates


def _of_peer(peer: Peer, config: Any) -> dict[str, Any]:
    return {
        "model": "SASRec", "layers": config["n_layers"], "hidden_size": config["hidden_size"],
        "train_batch_size": peer.batch, "parameters": peer.parameters,
    }  # fmt: skip
