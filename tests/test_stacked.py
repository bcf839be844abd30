"""The stacked model against the plain one; row optimizers and smaller tables against loops."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shared
import smaller_tables
from dlrm_utils import Batch, to_offsets
from smaller_tables import rounded

SIZES = [7, 4, 11]
torch.sparse.check_sparse_tensor_invariants.disable()


def batch_of(bags, seed=0):
    """A Batch of ragged bags, one list of bags a table."""
    generator = torch.Generator().manual_seed(seed)
    indices, offsets = zip(*map(to_offsets, bags))
    rows = len(bags[0])
    dense = torch.rand(rows, 4, generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator).float()
    return Batch(dense, list(indices), list(offsets), labels)


def twins(notebook, bfloat16=False):
    """A taught model and a stacked one with the same weights."""
    torch.manual_seed(0)
    taught = notebook.DLRM(SIZES, 5, [6], [6], num_dense=4)
    torch.manual_seed(0)
    return taught, notebook.StackedDLRM(SIZES, 5, [6], [6], num_dense=4, bfloat16=bfloat16)


def one_step(model, optimizer, batch):
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def unstacked_state(state, table_sizes):
    """A stacked model's weights as those of one with separate tables."""
    rest = dict(state)
    tables = rest.pop("tables.weight").split(list(table_sizes))
    return {f"tables.{t}.weight": table for t, table in enumerate(tables)} | rest


def assert_same_weights(notebook, taught, stacked, atol=1e-6):
    state = unstacked_state(stacked.state_dict(), SIZES)
    assert list(state) == list(taught.state_dict())
    for name, weight in taught.state_dict().items():
        assert torch.allclose(weight, state[name], atol=atol), name


def bags_of_a_table(size, rows):
    bag = st.lists(st.integers(0, size - 1), max_size=4)
    return st.lists(bag, min_size=rows, max_size=rows)


@settings(max_examples=30)
@given(
    st.integers(1, 5).flatmap(
        lambda rows: st.tuples(*[bags_of_a_table(size, rows) for size in SIZES])
    )
)
def test_stacked_equals_taught_on_any_bags(notebook, bags):
    batch = batch_of(bags)
    taught, stacked = twins(notebook)
    assert torch.allclose(taught(*batch[:3]), stacked(*batch[:3]), atol=1e-6)
    one_step(taught, torch.optim.SGD(taught.parameters(), lr=0.5), batch)
    one_step(stacked, torch.optim.SGD(stacked.parameters(), lr=0.5), batch)
    assert_same_weights(notebook, taught, stacked)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_stacked_equals_taught_after_ten_steps(notebook, optimizer):
    taught, stacked = twins(notebook)
    taught_optimizer = optimizer(taught.parameters(), lr=0.1)
    stacked_optimizer = optimizer(stacked.parameters(), lr=0.1)
    for step in range(10):
        ids = np.random.default_rng(step).integers(0, SIZES, (32, 3))
        batch = batch_of([ids[:, [t]].tolist() for t in range(3)], step)
        one_step(taught, taught_optimizer, batch)
        one_step(stacked, stacked_optimizer, batch)
    assert_same_weights(notebook, taught, stacked, atol=1e-5)


def test_an_empty_bag_beside_a_double_one_is_not_taken_for_one_id_each(notebook):
    """Two ids in two bags, but not one in each."""
    batch = batch_of([[[1, 2], []], [[0], [3]], [[], [4, 4]]])
    taught, stacked = twins(notebook)
    assert torch.allclose(taught(*batch[:3]), stacked(*batch[:3]), atol=1e-6)


def test_tables_start_evenly_within_the_bounds_of_their_own_size(notebook):
    torch.manual_seed(0)
    separate = notebook.EmbeddingTables([4, 400], 8)
    stacked = notebook.StackedTables(separate).weight.detach().split([4, 400])
    for table, weight in zip(separate, stacked, strict=True):
        assert torch.equal(table.weight, weight)
        bound = len(weight) ** -0.5
        assert 0.7 * bound < weight.abs().max() <= bound
        assert 0.4 * bound < weight.abs().mean() < 0.6 * bound  # half the bound, if all are likely


def rows_and_gradients(seed, rows=9, width=4, n=20):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, rows, n)), torch.from_numpy(
        rng.normal(size=(n, width)).astype(np.float32)
    )


def give_gradient(parameter, ids, values):
    parameter.grad = torch.sparse_coo_tensor(ids[None], values, parameter.shape)


def test_row_adagrad_equals_a_loop_over_rows(notebook):
    table = torch.nn.Parameter(torch.zeros(9, 4))
    optimizer = notebook.RowAdagrad([table], lr=0.3)
    weights, sums = np.zeros((9, 4)), np.zeros(9)
    for step in range(5):
        ids, values = rows_and_gradients(step)
        give_gradient(table, ids, values)
        optimizer.step()
        for row in set(ids.tolist()):
            gradient = values.numpy().astype(float)[ids.numpy() == row].sum(0)
            sums[row] += (gradient**2).mean()
            weights[row] -= 0.3 * gradient / np.sqrt(sums[row])
    assert np.allclose(table.detach(), weights, atol=1e-5)
    assert np.allclose(optimizer.state[table]["sum"].squeeze(1), sums, rtol=1e-5)


def test_row_adagrad_equals_fbgemms(notebook):
    """FBGEMM's fused operator is what TorchRec trains with."""
    fbgemm = pytest.importorskip(
        "fbgemm_gpu.split_table_batched_embeddings_ops_training"
    )  # there are builds for Linux only
    reference = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(
        [(9, 4, fbgemm.EmbeddingLocation.HOST, fbgemm.ComputeDevice.CPU)],
        optimizer=fbgemm.OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.3,
        eps=1e-10,
    )
    start = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    reference.split_embedding_weights()[0].copy_(start)
    table = torch.nn.Parameter(start.clone())
    optimizer = notebook.RowAdagrad([table], lr=0.3)
    for step in range(5):
        ids, values = rows_and_gradients(step)
        (reference(ids, torch.arange(len(ids) + 1)) * values).sum().backward()
        give_gradient(table, ids, values)
        optimizer.step()
    assert torch.allclose(table.detach(), reference.split_embedding_weights()[0], atol=1e-6)


def test_dense_parameters_get_pytorchs_adagrad(notebook):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizers = notebook.RowAdagrad([ours], lr=0.1), torch.optim.Adagrad([theirs], lr=0.1)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(3, 2)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs)


def test_a_step_leaves_other_rows_alone_and_keeps_one_number_a_row(notebook):
    _, stacked = twins(notebook)
    optimizer, start = (
        notebook.RowAdagrad(stacked.parameters(), lr=0.1),
        stacked.tables.weight.detach().clone(),
    )
    one_step(stacked, optimizer, batch_of([[[0], [2]], [[1], [1]], [[5], []]]))
    assert stacked.tables.weight.grad.is_sparse
    changed = (stacked.tables.weight != start).any(1).nonzero()[:, 0].tolist()
    assert changed == [0, 2, 8, 16]  # rows of the stack: 7 and 11 is where tables 1 and 2 start
    assert optimizer.state[stacked.tables.weight]["sum"].shape == (sum(SIZES), 1)


def test_bfloat16_is_close_to_32_bits_but_not_equal_and_keeps_weights_in_32_bits(notebook):
    taught, stacked = twins(notebook, bfloat16=True)
    batch = batch_of([[[i % size] for i in range(16)] for size in SIZES])
    logits = stacked(*batch[:3])
    difference = (taught(*batch[:3]) - logits).abs().max()
    assert logits.dtype == torch.float32
    assert 1e-5 < difference < 0.02  # 8 bits of precision are off by more than 24 can be
    one_step(stacked, notebook.RowAdagrad(stacked.parameters(), lr=0.1), batch)
    assert all(p.dtype == torch.float32 for p in stacked.parameters())


@pytest.mark.parametrize("bfloat16", [False, True])
def test_bfloat16_is_what_the_mlps_multiply_in_where_it_is_asked_for(notebook, bfloat16):
    _, stacked = twins(notebook, bfloat16=bfloat16)
    kinds = set()
    for layer in [stacked.bottom[0], stacked.top[0], stacked.top[-1]]:
        layer.register_forward_hook(lambda layer, inputs, output: kinds.add(output.dtype))
    stacked(*batch_of([[[1], [2]]] * 3)[:3])
    assert kinds == {torch.bfloat16 if bfloat16 else torch.float32}


@pytest.mark.skipif(
    not shared.has_bfloat16(), reason="bfloat16 is no faster here; it would be imitated, slowly"
)
def test_bfloat16_harms_the_log_loss_less_than_other_seeds_do(notebook, toy):
    losses = np.zeros((2, 3))
    for bfloat16, seed in itertools.product((False, True), range(3)):
        torch.manual_seed(seed)
        model = notebook.StackedDLRM(toy.table_sizes, 8, [32], [32], bfloat16=bfloat16)
        optimizer = notebook.RowAdagrad(model.parameters(), lr=0.03)
        notebook.train(model, toy.batch, toy.train[:12_000], optimizer, 128, seed=seed)
        losses[int(bfloat16), seed] = notebook.evaluate(model, toy.batch(toy.test))["log_loss"]
    assert 0 < abs(np.diff(losses.mean(1))) < np.ptp(losses[0])


def test_hashed_and_quotient_remainder_tables_equal_loops(notebook):
    bags = [[[6, 0], [], [5, 5, 3]], [[3], [2], [1]], [[10, 4], [9], []]]
    batch = batch_of(bags)
    torch.manual_seed(0)
    hashed = smaller_tables.HashedTables([3, 3, 3], 5)
    divided = smaller_tables.QuotientRemainderTables(SIZES, 5, m=3)
    for table in divided.quotients:
        torch.nn.init.normal_(table.weight)
    for t, column in enumerate(bags):
        quotients, remainders = divided.quotients[t].weight, divided.remainders[t].weight
        for b, bag in enumerate(column):
            by_hash = sum((hashed[t].weight[i % 3] for i in bag), torch.zeros(5))
            products = (quotients[i // 3] * remainders[i % 3] for i in bag)
            by_parts = sum(products, torch.zeros(5))
            assert torch.allclose(hashed(*batch[1:3])[b, t], by_hash, atol=1e-6)
            assert torch.allclose(divided(*batch[1:3])[b, t], by_parts, atol=1e-6)
    pairs = {(i // 3, i % 3) for i in range(11)}
    assert len(pairs) == 11  # no two ids share both rows


def test_each_way_to_smaller_tables_starts_alive_and_has_the_size_it_says():
    """Ids within a table start with vectors of their own, of the width and scale of full ones."""
    sizes = [300, 50]
    torch.manual_seed(0)
    ways = smaller_tables.new_tables(sizes)
    each = [torch.arange(50)] * 2
    bags = {way: t(each, each).detach() for way, t in ways.items()}  # (50, 2, 16)
    assert all(bag.shape == (50, 2, smaller_tables.WIDTH) for bag in bags.values())
    full = bags["full"].std((0, 2))
    for way, looked_up in bags.items():
        distinct = [len(looked_up[:, t].unique(dim=0)) for t in range(2)]
        assert distinct == [8, 8] if way == "hashed, 8 rows" else [50, 50], way
        assert (looked_up.std((0, 2)) > full / 10).all(), way
    rank = torch.linalg.matrix_rank(bags["mixed, 4 or 16 wide"][:, 0])
    assert rank == smaller_tables.NARROW == 4  # 300 rows are narrow
    assert torch.linalg.matrix_rank(bags["mixed, 4 or 16 wide"][:, 1]) == 16  # 50 are not
    numbers = {way: shared.notebook.count(tables) for way, tables in ways.items()}
    assert numbers == {
        "full": 350 * 16,
        "hashed, 64 rows": 114 * 16,
        "hashed, 8 rows": 16 * 16,
        "quotient, remainder 64": (64 + 5 + 50 + 1) * 16,
        "mixed, 4 or 16 wide": 300 * 4 + 4 * 16 + 50 * 16,
    }


@pytest.mark.parametrize("bits", [8, 3])
def test_rounded_numbers_are_off_by_half_a_step_at_most(bits):
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    largest = {8: 127, 3: 3}[bits]
    exact, step = rounded(weight, bits), weight.abs().amax(1, keepdim=True) / largest
    assert ((weight - exact).abs() <= step / 2 + 1e-6).all() and not exact[3].any()
    assert (weight - exact).abs().max() > step.max() / 4  # so it was rounded
    for row, size in zip(exact[:3], step[:3]):
        assert set((row / size).round().tolist()) <= set(range(-largest, largest + 1))


def test_optimizer_state_survives_a_checkpoint(notebook, tmp_path):
    _, stacked = twins(notebook)
    optimizer = notebook.RowAdagrad(stacked.parameters(), lr=0.1)
    batch = batch_of([[[0], [2]], [[1], [1]], [[5], []]])
    one_step(stacked, optimizer, batch)
    notebook.save_checkpoint(tmp_path / "c.pt", stacked, optimizer, 1)
    other = copy.deepcopy(stacked)
    other_optimizer = notebook.RowAdagrad(other.parameters(), lr=0.1)
    assert notebook.load_checkpoint(tmp_path / "c.pt", other, other_optimizer)["step"] == 1
    one_step(stacked, optimizer, batch)
    one_step(other, other_optimizer, batch)
    assert all(map(torch.equal, stacked.state_dict().values(), other.state_dict().values()))
