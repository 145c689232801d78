"""The index dataset gives RecBole's rows, and its windows every target once with enough context."""

from collections import Counter

import numpy as np
import pytest
import torch
from recbole.data.dataset import SequentialDataset

from recbole_ssm.data import create_dataset, utils
from recbole_ssm.data.atomic_files import hardened
from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.data.sequence_loader import cut_windows
from recbole_ssm.errors import UserError
from recbole_ssm.trainer import get_trainer

from ..conftest import HEADER, build, random_rows, small_config, write_dataset

SPLITS = {
    "leave one out": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "ratio": {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "user", "mode": "full"},
    "by time": {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "none", "mode": "full"},
}


@pytest.mark.parametrize("order", ["exact", "float32"])
@pytest.mark.parametrize("eval_args", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("max_length", [5, 50])
def test_rows_are_those_of_recbole(order, eval_args, max_length):
    write_dataset("tiny", random_rows())  # times a hundred seconds apart, which float32 still tells apart
    config = small_config("Mamba4Rec", time_order=order, MAX_ITEM_LIST_LENGTH=max_length, eval_args=eval_args)
    ours = create_dataset(config).build()
    theirs = hardened(SequentialDataset)(config).build()
    for mine, recbole in zip(ours, theirs, strict=True):
        assert len(mine) == len(recbole)
        got, want = mine[np.arange(len(mine))], recbole[np.arange(len(mine))]
        for field in ("user_id", "item_id", "item_length", "timestamp"):
            assert torch.equal(got[field], want[field]), field
        width = got["item_id_list"].shape[1]
        assert torch.equal(got["item_id_list"], want["item_id_list"][:, :width])
        assert not want["item_id_list"][:, width:].any()
        assert (mine.inter_matrix().toarray() == recbole.inter_matrix().toarray()).all()


def test_each_interaction_is_counted_once_however_short_histories_are_cut():
    write_dataset("tiny", random_rows())
    counted = [
        create_dataset(small_config("Mamba4Rec", MAX_ITEM_LIST_LENGTH=length)).build()[0].inter_matrix().toarray()
        for length in (1, 50)
    ]
    assert (counted[0] == counted[1]).all()


def tokens_in_order(config, user="u"):
    dataset = create_dataset(config)
    dataset.build()
    return list(dataset.id2token("item_id", dataset.sorted_items))


def test_exact_time_tells_seconds_apart_where_float32_does_not():
    base = 1_600_000_000  # float32 steps by 128 here
    write_dataset("tiny", [f"u\ti{k}\t{base + 10 - k}" for k in range(6)])
    assert tokens_in_order(small_config("Mamba4Rec")) == ["i5", "i4", "i3", "i2", "i1", "i0"]
    _, valid, test = create_dataset(small_config("Mamba4Rec")).build()
    for part, last in ((valid, "i1"), (test, "i0")):
        assert part.id2token("item_id", part.inter_feat["item_id"]) == last
    assert tokens_in_order(small_config("Mamba4Rec", time_order="float32")) == ["i0", "i1", "i2", "i3", "i4", "i5"]


def test_exact_time_survives_normalisation_and_nanoseconds():
    base = 1_600_000_000_000_000_000
    write_dataset("tiny", [f"u\ti{k}\t{base + 10 - k}" for k in range(6)])
    config = small_config("Mamba4Rec", normalize_all=True)
    assert tokens_in_order(config) == ["i5", "i4", "i3", "i2", "i1", "i0"]


def test_ties_keep_file_order():
    write_dataset("tiny", [f"u\ti{k}\t7" for k in (3, 1, 2, 0)])
    assert tokens_in_order(small_config("Mamba4Rec")) == ["i3", "i1", "i2", "i0"]


@pytest.mark.parametrize("max_length", [1, 2, 3, 7, 10, 50])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_windows_own_each_target_once_with_half_the_context(max_length, seed):
    sizes = np.array([1, 2, 6, 7, 8, 9, 10, 11, 13, 20, 21, 99, 100, 101])
    stop = np.cumsum(sizes + 2)
    start = stop - sizes
    generator = None if seed is None else np.random.default_rng(seed)
    owned_by = Counter()
    for begin, first, end in cut_windows(start, stop, max_length, generator):
        history = np.searchsorted(stop, begin, side="right")
        assert start[history] <= begin <= first < end <= stop[history]
        assert end - begin <= max_length
        for position in range(first, end):
            owned_by[position] += 1
            context, available = position - begin + 1, position - start[history] + 1
            assert context >= min(-(-max_length // 2), available)
    assert owned_by == Counter({p: 1 for s, e in zip(start, stop, strict=True) for p in range(s, e)})


def test_borders_move_from_epoch_to_epoch():
    start, stop = np.zeros(1, dtype=np.int64), np.array([1000])
    first, second = (cut_windows(start, stop, 50, np.random.default_rng([0, e])) for e in (0, 1))
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize("eval_args", SPLITS.values(), ids=SPLITS)
def test_an_epoch_sees_each_training_target_once(eval_args):
    _, _, (train_data, _, _) = build("Mamba4Rec", MAX_ITEM_LIST_LENGTH=8, train_batch_size=64, eval_args=eval_args)
    dataset = train_data._dataset
    histories = {}
    for row in range(len(dataset)):
        interaction = dataset[torch.tensor([row])]
        history = tuple(interaction["item_id_list"][0, : interaction["item_length"][0]].tolist())
        histories[row] = (history, int(interaction["item_id"]))
    for epoch in (0, 1):
        train_data.set_epoch(epoch)
        seen = Counter()
        sizes = []
        for batch in train_data:
            sizes.append(len(batch))
            for row, target in zip(batch.target_rows, batch.targets, strict=True):
                sequence = torch.searchsorted(batch.cu_seqlens, row, side="right") - 1
                context = tuple(batch.items[batch.cu_seqlens[sequence] : row + 1].tolist())
                seen[(context[-4:], int(target))] += 1
        assert seen == Counter((history[-4:], target) for history, target in histories.values())
        assert len(sizes) == len(train_data)
        assert abs(np.mean(sizes[:-1]) - 64) < 8


def test_epochs_are_repeatable_and_differ():
    _, _, (train_data, _, _) = build("Mamba4Rec")
    epochs = []
    for epoch in (0, 1, 0):
        train_data.set_epoch(epoch)
        epochs.append(torch.cat([batch.targets for batch in train_data]))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_workers_change_nothing():
    batches = []
    for workers in (0, 1):
        _, _, (train_data, _, _) = build("Mamba4Rec", worker=workers)
        batches.append([batch.items for batch in train_data])
    for alone, with_worker in zip(*batches, strict=True):
        assert torch.equal(alone, with_worker)


@pytest.mark.parametrize("doubled", [False, True])
def test_a_file_that_holds_its_rows_twice_is_told(doubled, caplog):
    rows = random_rows(users=5)
    alike = ["u0\ti1\t5", "u0\ti2\t5", "u1\ti2\t5"]  # two at one time, two of one item: none stands twice
    write_dataset("tiny", [*rows * (1 + doubled), *alike])
    create_dataset(small_config("Mamba4Rec", state="WARNING")).build()
    told = f"{len(rows)} of {2 * len(rows) + 3} interactions of tiny stand twice"
    assert (told in caplog.text, "stand twice" in caplog.text) == (doubled, doubled)


def test_a_user_with_one_interaction_is_left_out_aloud(caplog):
    write_dataset("tiny", [*random_rows(users=5), "lonely\ti1\t5"])
    config = small_config("Mamba4Rec", state="WARNING")
    datasets = create_dataset(config).build()
    assert "1 of 6 users of tiny have a single interaction" in caplog.text
    lonely = datasets[0].token2id("user_id", "lonely")
    assert all((part.inter_feat["user_id"] != lonely).all() for part in datasets)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a\tx\t1", "b\ty\t1"], "every user of tiny has a single interaction"),
        (["a\tx\t1", "a\ty\t", "a\tz\t2"], "1 of 3 interactions of tiny have no timestamp"),
    ],
)
def test_histories_that_cannot_be_used(lines, message):
    write_dataset("tiny", lines)
    with pytest.raises(UserError, match=message):
        create_dataset(small_config("Mamba4Rec")).build()


def test_columns_of_other_names():
    write_dataset("tiny", random_rows(), "customer:token\tsku:token\twhen:float")
    names = {"USER_ID_FIELD": "customer", "ITEM_ID_FIELD": "sku", "TIME_FIELD": "when"}
    for mode in ("sequence", "prefix"):
        _, model, (train_data, _, test_data) = build("Mamba4Rec", train_mode=mode, **names)
        assert model.calculate_loss(next(iter(train_data))).isfinite()
        interaction = next(iter(test_data))[0]
        assert model.eval().full_sort_predict(interaction).shape == (40, 31)
        assert (interaction["sku_list"][:, 0] > 0).all()


def test_removed_duplicates_leave_ties_in_file_order():
    lines = [f"u\ti{k % 500}\t7" for k in range(1000)]
    write_dataset("tiny", lines)
    assert tokens_in_order(small_config("Mamba4Rec", rm_dup_inter="first")) == [f"i{k}" for k in range(500)]


@pytest.mark.parametrize("name", ["Mamba4Rec", "SASRec"])
def test_users_evaluated_at_a_time_change_no_metric(name, monkeypatch):
    results = []
    for scores, batches in ((1 << 22, 1), (31 * 7, 6)):
        monkeypatch.setattr(utils, "SCORES_AT_A_TIME", (scores, scores))
        config, model, (train_data, valid_data, _) = build(
            name, loss_type="CE", metrics=["Recall", "NDCG", "MRR", "GAUC"]
        )
        assert len(valid_data) == batches
        trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
        trainer.eval_collector.data_collect(train_data)
        results.append(trainer.evaluate(valid_data, load_best_model=False))
    assert results[0] == results[1]


def test_sampled_evaluation_runs():
    sampled = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni10"}
    _, model, (_, valid_data, _) = build("Mamba4Rec", eval_args=sampled)
    interaction, row_index, positive_u, positive_i = next(iter(valid_data))
    assert model.eval().predict(interaction).shape == row_index.shape
    assert len(positive_u) == len(positive_i)


@pytest.mark.parametrize(
    "settings",
    [
        {"user_inter_num_interval": "[12,inf)", "item_inter_num_interval": "[15,inf)"},
        {"item_inter_num_interval": "[0,29);[31,40]"},
        {"user_inter_num_interval": "(8,20);[22,23]"},
        {"val_interval": {"item_id": ["i1", "i2", "i3", "i4"], "timestamp": "[1000000300,inf)"}},
    ],
    ids=str,
)
def test_filters_are_those_of_recbole(settings):
    lines = [*random_rows(users=60), "\ti1\t1", "u1\t\t1"]  # a user and an item without a name
    write_dataset("tiny", lines)
    config = small_config("Mamba4Rec", **settings)
    ours, theirs = create_dataset(config), hardened(SequentialDataset)(config)
    assert len(ours.inter_feat) == len(theirs.inter_feat) < len(lines) - 2
    for field in ("user_id", "item_id"):
        assert list(ours.field2id_token[field]) == list(theirs.field2id_token[field])
        assert (ours.inter_feat[field].to_numpy() == theirs.inter_feat[field].to_numpy()).all()


def test_a_user_and_a_friend_share_their_names():
    """Two columns of one alias have one list of tokens."""
    header = HEADER + "\tfriend:token"
    write_dataset("tiny", ["a\tx\t1\tb", "b\ty\t2\ta", "a\ty\t3\tc"], header)
    config = small_config("Mamba4Rec", alias_of_user_id=["friend"], load_col=None)
    dataset = create_dataset(config)
    assert list(dataset.field2id_token["user_id"]) == ["[PAD]", "a", "b", "c"]
    assert list(dataset.inter_feat["friend"]) == [2, 1, 3]


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
def test_time_gaps_stand_beside_their_items(mode):
    rows = [f"{user}\t{item}\t{time}" for user in "ab" for item, time in zip("vwxyz", (5, 5, 6, 9, 73), strict=True)]
    write_dataset("clock", rows[::-1])
    _, model, (train_data, _, test_data) = build("STARRec", "clock", use_time_gaps=True, train_mode=mode)
    bucket = {"w": 0, "v": 1, "x": 2, "y": 3, "z": 7}  # w, first of a tie in the file; gaps of 0, 1, 3 and 64
    token = train_data._dataset.field2id_token["item_id"]
    row = test_data._dataset[torch.arange(2)]
    wanted = [[bucket.get(token[item], 0) for item in items] for items in row["item_id_list"]]
    assert row[SequenceDataset.TIME_COLUMNS][..., 0].tolist() == wanted
    if mode == "sequence":
        items, gaps = next(iter(train_data)).items.unbind(-1)
        assert gaps.tolist() == [bucket[token[item]] for item in items]
    model.calculate_loss(next(iter(train_data)))[0].backward()
    assert model.time_gap_embedding.weight.grad[:2].abs().sum(1).min() > 0
    before = model.eval().full_sort_predict(row)
    row[SequenceDataset.TIME_COLUMNS][0, 1] = 20
    after = model.full_sort_predict(row)
    assert not torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])
