"""What happens to rows between the file and the batch: lists, filters, files split beforehand, columns' names."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import Config
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.data.filters import Filters
from recbole_ssm.distributed import weight_of
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import build_model, train_and_test
from recbole_ssm.trainer import get_trainer

from ..conftest import HEADER, build, random_rows, small_config, write_dataset

LISTS = HEADER + "\ttags:token_seq\tscores:float_seq\tprice:float"
LIST_ROWS = [
    "u\ta\t1\tred blue\t1 3\t2",
    "u\tb\t2\t\t\t4",
    "u\tc\t3\tblue\t2\t",
    'v\ta\t1\tNA "x\t5\t6',
    "v\tb\t2\tred\t\t4",
]


def config_of(model, **settings):
    if model == "Mamba4Rec":
        return small_config(model, **settings)
    return Config(model, "tiny", config_dict={"state": "ERROR", "data_path": "dataset", **settings})


@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec", "FM"])
def test_columns_of_lists_are_read_as_by_recbole(model):
    write_dataset("tiny", LIST_ROWS, LISTS)
    dataset = create_dataset(config_of(model, load_col=None))
    tags = [list(dataset.id2token("tags", row)) for row in dataset.inter_feat["tags"]]
    assert tags == [["red", "blue"], [], ["blue"], ["NA", '"x'], ["red"]]
    assert [row.tolist() for row in dataset.inter_feat["scores"]] == [[1, 3], [], [2], [5], []]
    assert dataset.inter_feat["price"].tolist() == [2, 4, 4, 6, 4]
    assert (dataset.field2seqlen["tags"], dataset.field2seqlen["scores"], dataset.field2seqlen["price"]) == (2, 2, 1)


@pytest.mark.parametrize("setting", [{"normalize_all": True}, {"normalize_field": ["scores", "price"]}], ids=str)
@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec", "FM"])
def test_lists_are_normalized_together(model, setting):
    write_dataset("tiny", LIST_ROWS, LISTS)
    dataset = create_dataset(config_of(model, load_col=None, **setting))
    assert [row.tolist() for row in dataset.inter_feat["scores"]] == [[0, 0.5], [], [0.25], [1], []]
    assert dataset.inter_feat["price"].tolist() == [0, 0.5, 0.5, 1, 0.5]


def test_what_is_all_the_same_is_normalized_to_1():
    write_dataset("tiny", ["u\ta\t1\t7 7\t3", "u\tb\t1\t7\t3"], HEADER + "\tscores:float_seq\tprice:float")
    dataset = create_dataset(config_of("FM", load_col=None, normalize_all=True))
    assert [row.tolist() for row in dataset.inter_feat["scores"]] == [[1, 1], [1]]
    assert dataset.inter_feat["price"].tolist() == [1, 1]


def test_only_numbers_are_normalized():
    write_dataset("tiny", LIST_ROWS, LISTS)
    with pytest.raises(UserError, match=r"normalize_field is \['tags'\]: .*\(there are: timestamp, scores, price\)"):
        create_dataset(config_of("FM", load_col=None, normalize_field=["tags"]))
    with pytest.raises(UserError, match="normalize_field and normalize_all are both set"):
        create_dataset(config_of("FM", load_col=None, normalize_field=["price"], normalize_all=True))


def test_numbers_in_buckets():
    write_dataset("tiny", LIST_ROWS, LISTS)
    settings = {
        "numerical_features": ["scores", "price", "timestamp"],
        "discretization": {
            "scores": {"method": "ED", "bucket": 4}, "price": {"method": "LD"},
        },
    }  # fmt: skip
    dataset = create_dataset(config_of("FM", load_col=None, **settings))
    assert [[half.tolist() for half in row] for row in dataset.inter_feat["scores"]] == [
        [[1, 1], [1, 2]], [[], []], [[1], [1]], [[1], [4]], [[], []],
    ]  # fmt: skip
    prices = [2, 4, 4, 6, 4]
    levels = np.unique([2 if p == 2 else np.floor(np.log(p + 1e-9) ** 2 + 1) for p in prices], return_inverse=True)[1]
    assert dataset.inter_feat["price"].tolist() == [[1, level] for level in levels]
    assert dataset.inter_feat["timestamp"].tolist() == [[time, 1] for time in (1, 2, 3, 1, 2)]
    assert dataset.num("scores") == 5
    batch = dataset.build()[0][torch.tensor([0])]
    assert batch["scores"].shape[1:] == (2, 2)


@pytest.mark.parametrize("cell", ["1 x", "1 inf", "nan"])
def test_a_list_of_numbers_holds_numbers(cell):
    write_dataset("tiny", ["u\ta\t1\t1", "", f"u\tb\t2\t{cell}"], HEADER + "\tscores:float_seq")
    with pytest.raises(UserError, match=f"line 4 has {cell} in column scores:float_seq, which is no list of numbers"):
        create_dataset(config_of("FM", load_col=None))


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
def test_models_train_beside_lists(mode):
    rows = [f"{row}\t{'red blue'[: k % 9]}\t{'1 2 3'[: k % 6]}" for k, row in enumerate(random_rows(users=8))]
    write_dataset("tiny", rows, HEADER + "\ttags:token_seq\tscores:float_seq")
    _, model, (train_data, _, _) = build("Mamba4Rec", load_col=None, train_mode=mode)
    assert model.calculate_loss(next(iter(train_data))).isfinite()


BAD_INTERVALS = ["5", 5, "[5,20", "5,20]", "[5]", "[20,5]", "[5,20];", "", "[a,b]", "[5,nan]", "[1,2,3]", "[5;20]", [5]]


@pytest.mark.parametrize("interval", BAD_INTERVALS, ids=str)
@pytest.mark.parametrize("model", ["Mamba4Rec", "BPR"])
def test_what_is_no_interval(interval, model):
    write_dataset("tiny", random_rows())
    for setting in ("user_inter_num_interval", "item_inter_num_interval"):
        with pytest.raises(UserError, match=rf"{setting} has .*, which is no interval: write it as '\[5,inf\)'"):
            create_dataset(config_of(model, **{setting: interval}))
    load = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    with pytest.raises(UserError, match=r"val_interval has .*, which is no interval"):
        create_dataset(config_of(model, **load, val_interval={"timestamp": interval}))


def test_intervals_are_those_of_recbole():
    write_dataset("tiny", random_rows())
    parse = create_dataset(small_config("Mamba4Rec"))._parse_intervals_str
    for good in ("[5,inf)", "(0,1];[3,4)", " [ 5 , 20 ] ; (-1e3,.5]", [5, 20], (5, 20), "[-inf,INF]"):
        assert parse(good) == super(Filters, create_dataset(small_config("Mamba4Rec")))._parse_intervals_str(good)


BAD_VALUES = {
    "a number": (5, "val_interval is 5: choose"),
    "no column": ({"colour": ["red"]}, "val_interval names colour, which is no loaded column"),
    "one token": ({"item_id": "i1"}, "val_interval of item_id is 'i1': make it a list of tokens"),
}


@pytest.mark.parametrize(("interval", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_what_is_no_filter_of_values(interval, message):
    write_dataset("tiny", random_rows())
    with pytest.raises(UserError, match=message):
        create_dataset(small_config("Mamba4Rec", val_interval=interval))


FILTERS = {
    "values": ({"val_interval": {"price": "[2,inf)"}}, 3, "val_interval ({'price': '[2,inf)'})"),
    "tokens that are numbers": ({"val_interval": {"item_id": [1, 2]}}, 3, "val_interval ({'item_id': [1, 2]})"),
    "duplicates": ({"rm_dup_inter": "first"}, 1, "rm_dup_inter (first)"),
    "rare": ({"item_inter_num_interval": "[2,inf)"}, 1, "item_inter_num_interval ([2,inf))"),
    "without features": ({"filter_inter_by_user_or_item": True}, 1, "filter_inter_by_user_or_item (True)"),
}


@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec", "BPR"])
@pytest.mark.parametrize(("settings", "left_out", "reason"), FILTERS.values(), ids=FILTERS)
def test_filters_tell_what_they_leave_out(settings, left_out, reason, model, caplog):
    rows = ["u\t1\t1\t1", "u\t2\t2\t2", "v\t2\t3\t", "u\t1\t4\t3", "v\t3\t5\t", "u\t3\t6\t5", "v\t4\t7\t5"]
    write_dataset("tiny", rows, HEADER + "\tprice:float")
    if "filter_inter_by_user_or_item" in settings:
        Path("dataset/tiny/tiny.item").write_text("item_id:token\n1\n2\n3\n")
    with caplog.at_level("INFO"):
        dataset = create_dataset(config_of(model, load_col=None, state="INFO", **settings))
    assert reason in caplog.text
    assert f"{left_out} of {len(rows)} interactions of tiny are left out by" in caplog.text
    told = [int(line.split(" of ")[0].split()[-1]) for line in caplog.messages if "are left out by" in line]
    assert len(dataset.inter_feat) + sum(told) == len(rows)


SPLIT = "user_id:token\titem_id_list:token_seq\titem_id:token"
SPLIT_ROWS = {
    "train": ["u\ta b c\td", "v\tb\td", "w\tf e d c b a\tb"],
    "valid": ["u\ta b c d\te"],
    "test": ["v\tb d\tf"],
}
SPLIT_SETTINGS = {"benchmark_filename": ["train", "valid", "test"], "train_mode": "prefix", "load_col": None}


def write_split(rows=SPLIT_ROWS, headers=SPLIT):
    for part, lines in rows.items():
        header = headers if isinstance(headers, str) else headers[part]
        write_dataset("tiny", lines, header).rename(f"dataset/tiny/tiny.{part}.inter")


@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec"])
@pytest.mark.parametrize("alias", [None, ["item_id_list"]])
def test_split_files_know_their_items_and_keep_the_latest(model, alias, caplog):
    write_split()
    settings = {**SPLIT_SETTINGS, "alias_of_item_id": alias, "MAX_ITEM_LIST_LENGTH": 4}
    settings = settings if model == "Mamba4Rec" else {key: settings[key] for key in settings if key != "train_mode"}
    with caplog.at_level("INFO"):
        dataset = create_dataset(config_of(model, state="INFO", **settings))
    assert "1 rows of dataset/tiny/tiny.train.inter are longer than MAX_ITEM_LIST_LENGTH (4)" in caplog.text
    assert dataset.item_num == 7  # one id each
    got = []
    for part in dataset.build():
        for row in range(len(part)):
            batch = part[torch.tensor([row])]
            history = batch["item_id_list"][0, : batch["item_length"][0]]
            assert not batch["item_id_list"][0, batch["item_length"][0] :].any()
            assert batch["item_id_list"].shape[1] == 4
            got.append((" ".join(part.id2token("item_id", history)), part.id2token("item_id", batch["item_id"])[0]))
    assert got == [("a b c", "d"), ("b", "d"), ("d c b a", "b"), ("a b c d", "e"), ("b d", "f")]


@pytest.mark.parametrize("parts", ["train", ["train", "valid"], ["train", "valid", "../tiny"], [1, 2, 3], []], ids=str)
def test_three_files_are_three_names(parts):
    write_split()
    with pytest.raises(UserError, match=r"benchmark_filename is .*: (name the parts for training|choose a list)"):
        create_dataset(small_config("Mamba4Rec", **{**SPLIT_SETTINGS, "benchmark_filename": parts}))


def test_split_files_without_histories():
    write_split({part: ["u\ta\t1"] for part in SPLIT_ROWS}, HEADER)
    with pytest.raises(
        UserError, match=r"tiny\.train\.inter has no column item_id_list \(it has user_id, item_id, times"
    ):
        create_dataset(small_config("Mamba4Rec", **SPLIT_SETTINGS))
    assert len(create_dataset(config_of("BPR", benchmark_filename=["train", "valid", "test"])).inter_feat) == 3


def test_split_files_differ_in_columns():
    headers = {part: SPLIT + ("\tprice:float" if part == "test" else "") for part in SPLIT_ROWS}
    write_split({**SPLIT_ROWS, "test": ["v\tb d\tf\t1"]}, headers)
    with pytest.raises(
        UserError, match=r"tiny\.test\.inter and tiny\.train\.inter differ in price: give them the same"
    ):
        create_dataset(small_config("Mamba4Rec", **SPLIT_SETTINGS))


def test_split_files_with_an_empty_history():
    write_split({**SPLIT_ROWS, "valid": ["u\t\te", "u\ta\te"]})
    with pytest.raises(UserError, match=r"1 rows of dataset/tiny/tiny\.valid\.inter have an empty item_id_list"):
        create_dataset(small_config("Mamba4Rec", **SPLIT_SETTINGS))


def test_rows_without_a_target_are_left_out_of_split_files_aloud(caplog):
    write_split({**SPLIT_ROWS, "train": ["u\ta b\t", *SPLIT_ROWS["train"]]})
    dataset = create_dataset(small_config("Mamba4Rec", state="WARNING", **SPLIT_SETTINGS))
    assert "1 rows of dataset/tiny/tiny.train.inter have no user_id or item_id (the first is line 2)" in caplog.text
    assert [len(part) for part in dataset.build()] == [3, 1, 1]


def test_an_alias_is_a_loaded_column():
    write_dataset("tiny", random_rows())
    for alias in (["friend"], "item_id", ["timestamp"]):
        with pytest.raises(UserError, match=r"alias_of_item_id is .*: make it a list of loaded columns of tokens"):
            create_dataset(small_config("Mamba4Rec", alias_of_item_id=alias))


def test_a_knowledge_graph_tells_what_it_leaves_out(caplog):
    write_dataset("tiny", [f"u{k % 3}\ti{k % 5}\t{k}" for k in range(30)])
    Path("dataset/tiny/tiny.link").write_text(
        "item_id:token\tentity_id:token\n" + "".join(f"i{k}\tNA{k}\n" for k in range(4))
    )
    triples = ["NA0\tnull\tNA1", '"NA2\tnull\tNA3', "NA2\tnull\tNA3", "NA1\tnull\t", "other\tNA\tNA0"]
    Path("dataset/tiny/tiny.kg").write_text(
        "head_id:token\trelation_id:token\ttail_id:token\n" + "".join(f"{line}\n" for line in triples)
    )
    with caplog.at_level("INFO"):
        dataset = create_dataset(config_of("CFKG", load_col=None, state="INFO"))
    assert (
        "1 rows of dataset/tiny/tiny.kg have no head_id or relation_id or tail_id (the first is line 5)" in caplog.text
    )
    assert "6 of 30 interactions of tiny are left out: no entity is linked to their item" in caplog.text
    names = dataset.field2id_token["entity_id"]
    graph = {(names[head], names[tail]) for head, tail in dataset.kg_feat[["head_id", "tail_id"]].to_numpy()}
    assert graph == {("NA0", "NA1"), ('"NA2', "NA3"), ("NA2", "NA3"), ("other", "NA0")}
    assert len(dataset.inter_feat) == 24


COLUMNS = [
    "weight", "target_weights", "items", "last", "cu_seqlens", "buffer", "negatives", "targets", "length",
    "interaction", "shape",
]  # fmt: skip


@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec"])
def test_columns_are_not_taken_for_what_batches_carry(model):
    rows = [f"{row}\t{'	'.join(str(k % 5) for _ in COLUMNS)}" for k, row in enumerate(random_rows(users=8))]
    losses = []
    for load_col in (None, {"inter": ["user_id", "item_id", "timestamp"]}):
        write_dataset("tiny", rows, "\t".join([HEADER, *(f"{name}:float" for name in COLUMNS)]))
        settings = {"load_col": load_col, "epochs": 1, "train_batch_size": 32, "train_neg_sample_args": None}
        settings |= {"train_mode": "prefix"} if model == "Mamba4Rec" else {}
        config = config_of(model, loss_type="CE", **settings)
        train_data, _, _ = data_preparation(config, create_dataset(config))
        torch.manual_seed(0)
        trainer_class = get_trainer(config["MODEL_TYPE"], model)
        trainer = trainer_class(config, build_model(config, train_data))
        trainer.fit(train_data, saved=False, verbose=False)
        losses.append(trainer.train_loss_dict[0])
    assert losses[0] == losses[1]


def test_the_weight_of_a_batch_is_what_it_was_given():
    write_dataset("tiny", [f"{row}\t7" for row in random_rows(users=8)], HEADER + "\tweight:float")
    _, _, (train_data, _, _) = build("Mamba4Rec", load_col=None, train_mode="prefix")
    batch = next(iter(train_data))
    assert weight_of(batch) == 1.0
    batch.weight = 0.5
    assert weight_of(batch) == 0.5
    assert (batch["weight"] == 7).all()
    empty = torch.zeros(1, dtype=torch.int64)
    assert weight_of(SequenceBatch(empty, empty, empty, empty, weight=0.25)) == 0.25


@pytest.mark.parametrize(
    "column", ["item_id_list", "user_id_list", "item_length", "neg_item_id", "target_position", "time_columns_list"]
)
def test_names_that_rows_give_to_columns_of_their_own(column):
    write_dataset("tiny", [f"{row}\t1" for row in random_rows(users=8)], f"{HEADER}\t{column}:float")
    with pytest.raises(UserError, match=f"tiny.inter has a column {column}, as rows made of it have one"):
        create_dataset(small_config("Mamba4Rec", load_col=None))
    create_dataset(small_config("Mamba4Rec"))  # not loaded, it is in nobody's way


def test_a_catalogue_smaller_than_what_is_ranked():
    """torch's own words for it came after the first epoch."""
    write_dataset("tiny", random_rows(users=8, items=5))
    with pytest.raises(UserError, match=r"topk is \[10\], but tiny has 5 items: set --topk to at most that"):
        train_and_test(small_config("Mamba4Rec", epochs=1))
    result = train_and_test(small_config("Mamba4Rec", epochs=1, topk=5, valid_metric="NDCG@5")).result
    assert result["test_result"]["hit@5"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"numerical_features": ["tags"]}, r"numerical_features is \['tags'\]: make it a list of columns of numbers"),
        (
            {"preload_weight": {"x": "price"}},
            r"tiny cannot be read as it is set \(.*: Preload id field \[x\] not exist",
        ),
    ],
)
def test_settings_of_columns_that_are_not_there(settings, message):
    write_dataset("tiny", LIST_ROWS, LISTS)
    with pytest.raises(UserError, match=message):
        create_dataset(small_config("Mamba4Rec", load_col=None, **settings))


def test_an_empty_column_of_numbers_beside_one_of_words():
    write_dataset("tiny", [f"{row}\t\tlarge" for row in random_rows(users=8)], f"{HEADER}\tprice:float\tsize:float")
    with pytest.raises(UserError, match="line 2 has large in column size:float, which is no number"):
        create_dataset(small_config("Mamba4Rec", load_col=None))


@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec"])
def test_a_single_target_is_trained_on(model):
    """RecBole counts a model's operations by the second one."""
    write_dataset("tiny", ["u\ta\t1", "u\tb\t2"])
    settings = {"epochs": 1, "topk": 1, "valid_metric": "NDCG@1", "train_neg_sample_args": None, "show_progress": False}
    assert train_and_test(config_of(model, **settings)).result["test_result"] is None
