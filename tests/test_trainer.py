"""The training loop: RecBole's steps, exact under mixed precision."""

import copy

import numpy as np
import pytest
import torch
from recbole.trainer import Trainer
from torch.nn.utils import clip_grad_norm_

from recbole_ssm import UserError
from recbole_ssm.checkpoint import load_checkpoint
from recbole_ssm.trainer import STEPS_PER_CHECK, SequenceTrainer, get_trainer, learning_rate_factor

from .conftest import build


def trainer_of(name="Mamba4Rec", **settings):
    config, model, loaders = build(name, train_batch_size=64, dropout_prob=0.0, **settings)
    return get_trainer(config["MODEL_TYPE"], name)(config, model), loaders


@pytest.mark.parametrize("name", ["Mamba4Rec", "STARRec"])
@pytest.mark.parametrize("clip", [None, {"max_norm": 0.05}])
def test_an_epoch_is_that_of_recboles_loop(name, clip):
    # Not Adam, which makes whole steps of the rounding in gradients that are 0, such as that of the keys' bias.
    trainer, (train_data, _, _) = trainer_of(name, clip_grad_norm=clip, learner="sgd", learning_rate=0.5)
    config, twin = trainer.config, copy.deepcopy(trainer.model)
    theirs = Trainer(config, twin)
    loss, expected = trainer._train_epoch(train_data, 0), theirs._train_epoch(train_data, 0)
    assert loss == pytest.approx(expected, rel=1e-5)
    for (parameter, got), want in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=parameter: f"{n}: {m}")


def test_scaled_gradients_are_clipped_by_their_true_size():
    trainer, (train_data, _, _) = trainer_of(clip_grad_norm={"max_norm": 0.05}, learner="sgd", learning_rate=1.0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    twin = copy.deepcopy(trainer.model)
    batch = next(iter(train_data))
    trainer._optimize([batch], 0, None, False)
    twin.train().calculate_loss(batch).backward()
    assert clip_grad_norm_(twin.parameters(), 0.05) > 0.05
    for got, parameter in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, parameter - parameter.grad, rtol=1e-4, atol=1e-7)


def test_one_scaler_serves_the_run_and_its_resumption():
    trainer, (train_data, valid_data, _) = trainer_of(epochs=1)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
    trainer.fit(train_data, valid_data)
    grown = trainer.scaler.get_scale()
    assert grown > 512
    again, _ = trainer_of(epochs=2)
    again.scaler = torch.amp.GradScaler("cpu")
    again.resume_checkpoint(trainer.saved_model_file)
    assert again.scaler.get_scale() == grown


def test_mixed_precision_is_bfloat16_and_ranks_by_float32_scores():
    trainer, (train_data, valid_data, _) = trainer_of("STARRec", enable_amp=True)
    trainer.eval_collector.data_collect(train_data)
    seen, scores = [], []
    trainer.model.layers[0].register_forward_hook(
        lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    )
    predict = trainer.model.full_sort_predict
    trainer.model.full_sort_predict = lambda batch: scores.append(predict(batch)) or scores[-1]
    trainer._train_epoch(train_data, 0)
    trained = len(seen)
    trainer.evaluate(valid_data, load_best_model=False)
    assert len(seen) > trained > 0
    assert set(seen) == {(True, torch.bfloat16)}
    assert {s.dtype for s in scores} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["STARRec", "SSD4Rec", "Mamba4Rec"])
def test_mixed_precision_learns_as_single_precision_does(name):
    losses = []
    for amp in (False, True):
        trainer, (train_data, _, _) = trainer_of(name, enable_amp=amp, learning_rate=0.01)
        losses.append([sum_of(trainer._train_epoch(train_data, epoch)) for epoch in range(3)])
    exact, mixed = losses
    assert mixed[-1] < mixed[0]
    assert mixed == pytest.approx(exact, rel=0.02)


def sum_of(loss):
    return sum(loss) if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("step", [0, 1])
def test_nan_is_found_whenever_it_comes(step, monkeypatch):
    """On a GPU most steps are not looked at, but the sum of the epoch's losses is."""
    assert STEPS_PER_CHECK > 2
    trainer, _ = trainer_of()
    monkeypatch.setattr(trainer, "device", torch.device("meta"))  # any device but a CPU
    monkeypatch.setattr(trainer, "_autocast", lambda: torch.autocast("cpu", enabled=False))
    losses = iter([trainer.model.item_embedding.weight.sum() * (float("nan") if i == step else 1) for i in range(99)])

    monkeypatch.setattr(trainer, "_prepared", lambda batch: batch)
    with pytest.raises(UserError, match="the training loss became NaN in epoch 0"):
        trainer._optimize([None, None, None], 0, lambda batch: next(losses), False)


def test_which_trainer_serves_which_model():
    config, *_ = build("Mamba4Rec")
    assert get_trainer(config["MODEL_TYPE"], "SASRec") is SequenceTrainer  # RecBole's plain Trainer
    assert get_trainer(config["MODEL_TYPE"], "STARRec") is SequenceTrainer
    other = get_trainer(config["MODEL_TYPE"], "S3Rec")
    assert not issubclass(other, SequenceTrainer)
    assert not other.resumable


def test_the_optimizer_is_fused():
    trainer, _ = trainer_of(weight_decay=0.1, learner="adamw")
    assert type(trainer.optimizer) is torch.optim.AdamW
    for group, decay in zip(trainer.optimizer.param_groups, (0.1, 0.0), strict=True):
        assert group["fused"]
        assert group["weight_decay"] == decay
        assert group["lr"] == trainer.learning_rate


@pytest.mark.parametrize("learner", ["adamw", "adam", "adagrad"])
@pytest.mark.parametrize(
    ("name", "kept"), [("Mamba4Rec", {"A_log", "D"}), ("SSD4Rec", {"A_log", "D", "dt_bias"}), ("SASRec", set())]
)
def test_rates_of_the_state_space_are_kept_from_weight_decay(name, kept, learner):
    mode = {"train_mode": "sequence", "valid_metric": "NDCG@10"} if name == "SASRec" else {}
    config, model, _ = build(name, weight_decay=0.1, learner=learner, **mode)
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    decay = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(model.parameters())
    for parameter_name, parameter in model.named_parameters():
        assert decay[parameter] == (0.0 if parameter_name.rsplit(".")[-1] in kept else 0.1)


def test_without_weight_decay_there_is_one_group():
    assert len(trainer_of()[0].optimizer.param_groups) == 1


def test_learning_rate_factors():
    def factors(*schedule):
        return [learning_rate_factor(*schedule, progress) for progress in (0, 0.1, 0.2, 0.6, 1)]

    assert factors("constant", 0.0, 0) == [1, 1, 1, 1, 1]
    assert factors("constant", 0.2, 2) == pytest.approx([0, 0.5, 1, 1, 1])
    assert factors("linear", 0.2, 0) == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert factors("cosine", 0.2, 0) == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_factor("cosine", 0.0, 0, 0.25) == pytest.approx((1 + 2**-0.5) / 2)
    assert [learning_rate_factor("linear", 0.2, 1, p) for p in (0.1, 0.3, 0.5, 0.7, 1)] == pytest.approx(
        [0.5, 0.75, 0.25, 0.75, 0]
    )
    assert learning_rate_factor("cosine", 0.0, 1, 0.625) == pytest.approx((1 + 2**-0.5) / 2)


@pytest.mark.parametrize("name", ["Mamba4Rec", "SASRec"])
def test_the_learning_rate_follows_its_schedule(name, monkeypatch):
    mode = {} if name == "Mamba4Rec" else {"train_mode": "sequence"}
    settings = {"lr_scheduler_type": "linear", "learning_rate": 0.5, "learner": "sgd", "epochs": 2, "eval_step": 0}
    config, model, (train_data, _, _) = build(name, train_batch_size=64, **settings, **mode)
    trainer, rates = get_trainer(config["MODEL_TYPE"], name)(config, model), []
    step = trainer.optimizer.step
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda *a, **k: (rates.append(trainer.optimizer.param_groups[0]["lr"]), step(*a, **k)),
    )
    trainer.fit(train_data, saved=False)
    assert len(rates) > 4
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.5, rel=0.2)
    half = 0.5 * len(rates)
    assert rates[int(half)] == pytest.approx(0.25, rel=0.2)
    assert 0 < rates[-1] < 0.1
    assert trainer.learning_rate == 0.5


def test_an_average_of_weights_is_judged_and_kept(monkeypatch):
    """After each step a_n = b_n a_(n-1) + (1 - b_n) w_n; validation, checkpoint and model get it."""
    trainer, (train_data, valid_data, _) = trainer_of(ema_decay=0.5, epochs=2, learning_rate=0.05)
    expected, steps, judged = trainer.model.item_embedding.weight.detach().double(), 0, []
    update, evaluate = trainer._update, trainer.evaluate

    def watched():
        nonlocal expected, steps
        update()
        steps += 1
        decay = min(0.5, steps / (steps + 9))
        expected = decay * expected + (1 - decay) * trainer.model.item_embedding.weight.detach().double()

    def judging(*args, **kwargs):
        judged.append(trainer.model.item_embedding.weight.clone())
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(trainer, "_update", watched)
    monkeypatch.setattr(trainer, "evaluate", judging)
    trainer.fit(train_data, valid_data, verbose=False)
    assert steps > 9  # past the steps in which the decay rises
    assert torch.allclose(judged[-1].double(), expected, atol=1e-6)
    assert torch.equal(trainer.model.item_embedding.weight, judged[-1])
    kept = load_checkpoint(trainer.saved_model_file)
    assert torch.equal(kept["state_dict"]["item_embedding.weight"], judged[trainer.best_epoch])
    assert not torch.equal(kept["resume"]["state_dict"]["item_embedding.weight"], judged[-1])


@pytest.mark.parametrize("loss_type", ["BCE", "gBCE"])
def test_log_loss_is_of_probabilities(loss_type):
    of_scores = {"metrics": ["LogLoss", "AUC"], "valid_metric": "LogLoss", "eval_args": {"mode": "uni5"}}
    config, model, (train_data, valid_data, _) = build("Mamba4Rec", loss_type=loss_type, **of_scores)
    trainer = get_trainer(config["MODEL_TYPE"], "Mamba4Rec")(config, model)
    with torch.no_grad():
        model.item_embedding.weight.mul_(100)  # so that scores are other than what nothing is known of
    trainer.eval_collector.data_collect(train_data)
    # The loader draws its negatives anew each time, by NumPy's generator.
    state = np.random.get_state()
    found = trainer.evaluate(valid_data, load_best_model=False)
    np.random.set_state(state)
    with torch.no_grad():
        rows = [(model.eval().predict(rows), rows[config["LABEL_FIELD"]]) for rows, *_ in valid_data]
    scores, labels = (torch.cat(column).double() for column in zip(*rows, strict=True))
    assert scores.std() > 0.1
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels.to(scores))
    assert found["logloss"] == pytest.approx(float(loss), abs=1e-4)
    assert found["auc"] == pytest.approx(
        float((scores[labels == 1, None] > scores[labels == 0]).double().mean()), abs=1e-3
    )


@pytest.mark.parametrize("exclude_history", [False, True])
def test_a_target_that_may_not_repeat_is_the_last_of_the_candidates(exclude_history):
    """RecBole takes what scores -inf for no candidate: such a target's GAUC was below 0."""
    asked = {"metrics": ["GAUC", "Hit"], "valid_metric": "GAUC", "topk": 3, "exclude_history": exclude_history}
    config, model, (train_data, _, test_data) = build("Mamba4Rec", allow_repeats=False, **asked)
    trainer = get_trainer(config["MODEL_TYPE"], "Mamba4Rec")(config, model)
    trainer.eval_collector.data_collect(train_data)
    found = trainer.evaluate(test_data, load_best_model=False)
    below, repeated = [], 0
    for rows, *_ in test_data:
        with torch.no_grad():
            scores = model.eval().full_sort_predict(rows)[:, 1:]
        for row, target in zip(scores, rows["item_id"] - 1, strict=True):
            others = row[row.isfinite() & (torch.arange(len(row)) != target)]
            below.append((others < row[target]).double().mean())
            repeated += bool(row[target].isneginf())
    assert 0 < repeated < len(below)
    assert found["gauc"] == pytest.approx(float(torch.stack(below).mean()), abs=1e-4)


@pytest.mark.parametrize(("metric", "others", "expected"), [("GAUC", 1.0, 0), ("AUC", -torch.inf, 0.5)])
def test_among_sampled_items_a_target_that_may_not_repeat_is_the_last_or_ties(metric, others, expected):
    config, model, (train_data, _, test_data) = build(
        "Mamba4Rec", allow_repeats=False, metrics=[metric], valid_metric=metric, eval_args={"mode": "uni5"}
    )
    trainer = get_trainer(config["MODEL_TYPE"], "Mamba4Rec")(config, model)
    trainer.eval_collector.data_collect(train_data)
    model.predict = lambda rows: torch.where(rows[config["LABEL_FIELD"]] > 0, -torch.inf, others)
    assert trainer.evaluate(test_data, load_best_model=False)[metric.lower()] == expected


def test_labels_are_a_column():
    with pytest.raises(UserError, match="has no column 'label' that is loaded: name it by LABEL_FIELD"):
        build("STARRec", metrics=["AUC"], valid_metric="AUC", eval_args={"mode": "labeled"})
