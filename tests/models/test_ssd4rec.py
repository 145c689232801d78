"""SSD4Rec in one pass: one bidirectional layer gives, at each position, what the prefix that ends there would alone."""

import copy

import pytest
import torch

from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.errors import UserError
from recbole_ssm.ops.packing import cu_seqlens_from_lengths, flip_rows, last_rows, positions

from ..conftest import build, small_config, write_dataset
from ..launches import count_launches, optimizers_fused

both_streams = pytest.mark.parametrize("backward_stream", ["final", "aligned"])


def one_layer(**settings):
    """Of a model whose backward stream weighs as much as the forward one, so that its errors show."""
    plain = {"num_layers": 1, "beta": 1.0, "dropout_prob": 0.0, "mask_ratio": 0.0, "train_mode": "sequence"}
    _, model, _ = build("SSD4Rec", **{**plain, **settings})
    return model


def random_items(model, lengths):
    """Packed sequences of random items."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(1, model.n_items, (sum(lengths),), generator=generator)
    return items, cu_seqlens_from_lengths(torch.tensor(lengths))


def encode_rows(model, items, cu_seqlens, stride=1):
    """The hidden state of each prefix, read from a row of its own; of every ``stride``-th prefix of a sequence."""
    borders = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    prefixes = [items[begin : stop + 1] for begin, end in borders for stop in range(begin, end, stride)]
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([len(prefix) for prefix in prefixes]))
    return model.encode(torch.cat(prefixes), cu_seqlens, read=last_rows(cu_seqlens), last=True)


def with_gradients(model, hidden):
    """Hidden states, and the gradients of a random projection of them."""
    model.zero_grad()
    projection = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (hidden * projection.to(hidden.dtype)).sum().backward()
    return {"hidden": hidden.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_near(actual, expected, tolerance):
    """Relative to the largest entry of each tensor."""
    for name, wanted in expected.items():
        difference = (actual[name].double() - wanted.double()).abs().max() / wanted.abs().max()
        assert difference < tolerance, f"{name}: {difference}"


@both_streams
@pytest.mark.parametrize(("d_conv", "norm_embedding"), [(4, True), (4, False), (2, True), (2, False), (1, True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-12)], ids=str)
def test_one_pass_equals_a_row_for_each_prefix(backward_stream, d_conv, norm_embedding, dtype, tolerance):
    model = one_layer(backward_stream=backward_stream, d_conv=d_conv, norm_embedding=norm_embedding).to(dtype)
    items, cu_seqlens = random_items(model, [*range(26), 1, 1, 3])
    actual = with_gradients(model, model.encode(items, cu_seqlens))
    expected = with_gradients(model, encode_rows(model, items, cu_seqlens))
    # A model of any dtype takes its rates in float32, and so this gradient.
    rates = {name: values.pop("layers.0.mamba.A_log") for name, values in (("one", actual), ("rows", expected))}
    assert_near({"A_log": rates["one"]}, {"A_log": rates["rows"]}, max(tolerance, 1e-6))
    assert_near(actual, expected, tolerance)


@both_streams
@pytest.mark.parametrize("last", [False, True])
def test_two_layers_are_their_definition(backward_stream, last):
    """Both directions run at once; here one after the other, each projected on its own."""
    model = one_layer(backward_stream=backward_stream, num_layers=2, train_mode="prefix").double().eval()
    items, cu_seqlens = random_items(model, [5, 1, 17, 2])
    read = last_rows(cu_seqlens) if last else torch.tensor([0, 4, 9, 20])
    flip = flip_rows(cu_seqlens)

    def defined():
        x = model.norm(model.item_embedding(items))
        for layer in model.layers:
            back = layer.mamba(x[flip], cu_seqlens)
            back = back[flip] if backward_stream == "aligned" else back
            x = layer.feed_forward(layer.norm(layer.mamba(x, cu_seqlens) + model.layers[0].beta * back + x))
        return x[read]

    actual = with_gradients(model, model.encode(items, cu_seqlens, read, last))
    assert_near(actual, with_gradients(model, defined()), 1e-6)  # rates are float32


@both_streams
@pytest.mark.parametrize("var_len", [True, False])
def test_a_training_step_reads_nothing_back_and_launches_little(backward_stream, var_len):
    """As released: two layers, both directions, a row a target; 604 launches once."""
    released = {"hidden_size": 256, "d_state": 64, "headdim": 16, "num_layers": 2, "ssm_backend": "triton"}
    _, model, _ = build("SSD4Rec", backward_stream=backward_stream, var_len=var_len, **released)
    model.to("meta").train()
    rows = torch.ones(64, 200, dtype=torch.int64), torch.arange(1, 65), torch.ones(64, dtype=torch.int64)
    batch = SequenceBatch.of_rows(*rows).filled(200).to("meta")
    with optimizers_fused():
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()

    count_launches(step)  # which makes the optimizer's state
    launches = count_launches(step)
    assert launches["ssd.last_triton._forward"] >= 1
    assert launches.total() <= 220, launches


@both_streams
def test_one_pass_reads_nothing_back(backward_stream):
    model = one_layer(backward_stream=backward_stream, ssm_backend="triton")
    histories = SequenceBatch(*random_items(model, [30, 1, 7]), torch.tensor([3, 30, 37]), torch.ones(3).long())
    batch = histories.filled(50).to("meta")
    model.to("meta")
    assert count_launches(lambda: model.calculate_loss(batch).backward())["ssd.triton._forward"] > 0


@both_streams
def test_long_histories(backward_stream):
    """Float32 sums over a thousand items, and their gradients, are as exact as over a few."""
    model = one_layer(backward_stream=backward_stream, MAX_ITEM_LIST_LENGTH=1000)
    items, cu_seqlens = random_items(model, [1000, 3, 300])
    read = (positions(cu_seqlens) % 111 == 0).nonzero()[:, 0]
    exact = copy.deepcopy(model).double()
    expected = with_gradients(exact, encode_rows(exact, items, cu_seqlens, stride=111))
    assert_near(with_gradients(exact, exact.encode(items, cu_seqlens, read)), expected, 1e-7)
    assert_near(with_gradients(model, model.encode(items, cu_seqlens, read)), expected, 3e-5)


@both_streams
def test_other_sequences_change_nothing(backward_stream):
    """Not even by rounding: running sums begin anew with each sequence."""
    model = one_layer(backward_stream=backward_stream).eval()
    items, cu_seqlens = random_items(model, [300, 20, 1])
    together = model.encode(items, cu_seqlens)
    items[:300] = items[:300].flip(0)
    assert torch.equal(model.encode(items, cu_seqlens)[300:], together[300:])


@both_streams
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_agree(backward_stream, backend):
    model = one_layer(backward_stream=backward_stream, ssm_backend="reference")
    items, cu_seqlens = random_items(model, [1, 2, 40, 0, 5])
    expected = with_gradients(model, model.encode(items, cu_seqlens))
    model.layers[0].mamba.backend = backend
    assert_near(with_gradients(model, model.encode(items, cu_seqlens)), expected, 3e-5)


@both_streams
def test_bfloat16_autocast(backward_stream):
    model = one_layer(backward_stream=backward_stream)
    items, cu_seqlens = random_items(model, [1, 2, 40, 5])
    expected = with_gradients(model, model.encode(items, cu_seqlens))
    with torch.autocast("cpu"):
        hidden = model.encode(items, cu_seqlens)
    assert_near(with_gradients(model, hidden), expected, 0.05)


def test_prefixes_share_their_windows_mask():
    model = one_layer(mask_ratio=0.5)
    seen = []
    model.item_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    items, cu_seqlens = random_items(model, [30, 20])
    hidden = model.train().encode(items, cu_seqlens)
    (masked,) = seen
    assert 0 < (masked == 0).sum() < len(items)
    torch.testing.assert_close(hidden, encode_rows(model.eval(), masked, cu_seqlens))


def test_sequence_mode_is_for_one_layer_or_one_direction():
    write_dataset("tiny", ["u\ti\t1"])
    with pytest.raises(UserError, match="set num_layers: 1, bidirectional: False or train_mode: prefix"):
        small_config("SSD4Rec", train_mode="sequence")
    for settings in ({"num_layers": 1}, {"bidirectional": False}, {"train_mode": "prefix"}):
        small_config("SSD4Rec", **{"train_mode": "sequence", **settings})


@pytest.mark.parametrize(
    ("settings", "one_pass"),
    [
        ({"num_layers": 1}, True),
        ({"num_layers": 2}, False),
        ({"num_layers": 2, "bidirectional": False}, True),
        ({"num_layers": 1, "var_len": False}, False),
    ],
    ids=str,
)
def test_a_model_knows_whether_one_pass_will_do(settings, one_pass):
    _, model, _ = build("SSD4Rec", **settings)
    _, _, (histories, _, _) = build("Mamba4Rec")
    batch = next(iter(histories))
    if one_pass:
        assert model.calculate_loss(batch).isfinite()
    else:
        with pytest.raises(UserError, match="needs a row for each target: set train_mode: prefix"):
            model.calculate_loss(batch)


@pytest.mark.parametrize("train_mode", ["prefix", "sequence"])
def test_uncut_histories(train_mode):
    write_dataset("tiny", [f"u{user}\ti{(user + time) % 90}\t{time}" for user in range(3) for time in range(80)])
    uncut = {"MAX_ITEM_LIST_LENGTH": 2**20, "num_layers": 1, "train_mode": train_mode, "dropout_prob": 0.0}
    _, model, (train_data, _, test_data) = build("SSD4Rec", **uncut)
    rows, *_ = next(iter(test_data))
    assert rows[model.ITEM_SEQ_LEN].tolist() == [79] * 3
    assert rows[model.ITEM_SEQ].shape == (3, 79)
    scores = model.eval().full_sort_predict(rows)
    rows[model.ITEM_SEQ][:, 0] += 1  # read by a model of whole histories alone
    assert (model.full_sort_predict(rows) != scores).any()
    sum(model.train().calculate_loss(batch) for batch in train_data).backward()
    assert model.item_embedding.weight.grad.isfinite().all()
