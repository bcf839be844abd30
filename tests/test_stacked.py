"""Section 14: the stacked model against the taught one, the row optimizers against loops and FBGEMM's, smaller tables against loops."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import notebook_definitions
from dlrm_utils import Batch, prefetched, preprocess_criteo, to_offsets, write_toy_criteo

book = notebook_definitions.load()
SIZES = [7, 4, 11]
torch.sparse.check_sparse_tensor_invariants.disable()


def batch_of(bags, seed=0):
    """A Batch of ragged bags, one list of bags a table."""
    generator = torch.Generator().manual_seed(seed)
    indices, offsets = zip(*map(to_offsets, bags))
    rows = len(bags[0])
    return Batch(torch.rand(rows, 4, generator=generator), list(indices), list(offsets),
                 torch.randint(0, 2, (rows,), generator=generator).float())


def twins(bfloat16=False):
    """A taught model and a stacked one with the same weights."""
    torch.manual_seed(0)
    taught = book.DLRM(SIZES, 5, [6], [6], num_dense=4)
    stacked = book.StackedDLRM(SIZES, 5, [6], [6], num_dense=4, bfloat16=bfloat16)
    stacked.load_state_dict(book.stacked_state(taught.state_dict()))
    return taught, stacked


def one_step(model, optimizer, batch):
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def assert_same_weights(taught, stacked, atol=1e-6):
    state = book.unstacked_state(stacked.state_dict(), SIZES)
    assert list(state) == list(taught.state_dict())
    for name, weight in taught.state_dict().items():
        assert torch.allclose(weight, state[name], atol=atol), name


bags_of_a_table = lambda size, rows: st.lists(st.lists(st.integers(0, size - 1), max_size=4), min_size=rows, max_size=rows)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5).flatmap(lambda rows: st.tuples(*[bags_of_a_table(size, rows) for size in SIZES])))
def test_stacked_equals_taught_on_any_bags(bags):
    batch = batch_of(bags)
    taught, stacked = twins()
    assert torch.allclose(taught(*batch[:3]), stacked(*batch[:3]), atol=1e-6)
    one_step(taught, torch.optim.SGD(taught.parameters(), lr=0.5), batch)
    one_step(stacked, book.RowSGD(stacked.parameters(), lr=0.5), batch)
    assert_same_weights(taught, stacked)


@pytest.mark.parametrize("optimizers", [(torch.optim.SGD, torch.optim.SGD), (torch.optim.SGD, "RowSGD"), (torch.optim.Adagrad, torch.optim.Adagrad)])
def test_stacked_equals_taught_after_ten_steps(optimizers):
    taught, stacked = twins()
    first, second = [getattr(book, o) if isinstance(o, str) else o for o in optimizers]
    taught_optimizer, stacked_optimizer = first(taught.parameters(), lr=0.1), second(stacked.parameters(), lr=0.1)
    for step in range(10):
        ids = np.random.default_rng(step).integers(0, SIZES, (32, 3))
        batch = batch_of([ids[:, [t]].tolist() for t in range(3)], step)
        one_step(taught, taught_optimizer, batch)
        one_step(stacked, stacked_optimizer, batch)
    assert_same_weights(taught, stacked, atol=1e-5)


def test_an_empty_bag_beside_a_double_one_is_not_taken_for_one_id_each():
    """Two ids in two bags, but not one in each."""
    batch = batch_of([[[1, 2], []], [[0], [3]], [[], [4, 4]]])
    taught, stacked = twins()
    assert torch.allclose(taught(*batch[:3]), stacked(*batch[:3]), atol=1e-6)


def test_tables_start_within_the_bounds_of_their_own_size():
    tables = book.StackedTables([4, 400], 8).weight.detach().split([4, 400])
    for weight in tables:
        bound = len(weight) ** -0.5
        assert 0.7 * bound < weight.abs().max() <= bound


def rows_and_gradients(seed, rows=9, width=4, n=20):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, rows, n)), torch.from_numpy(rng.normal(size=(n, width)).astype(np.float32))


def give_gradient(parameter, ids, values):
    parameter.grad = torch.sparse_coo_tensor(ids[None], values, parameter.shape)


def test_row_adagrad_equals_a_loop_over_rows():
    table = torch.nn.Parameter(torch.zeros(9, 4))
    optimizer = book.RowAdagrad([table], lr=0.3)
    weights, sums = np.zeros((9, 4)), np.zeros(9)
    for step in range(5):
        ids, values = rows_and_gradients(step)
        give_gradient(table, ids, values)
        optimizer.step()
        for row in set(ids.tolist()):
            gradient = values.numpy().astype(float)[ids.numpy() == row].sum(0)
            sums[row] += (gradient ** 2).mean()
            weights[row] -= 0.3 * gradient / np.sqrt(sums[row])
    assert np.allclose(table.detach(), weights, atol=1e-5)
    assert np.allclose(optimizer.state[table]["sum"], sums, rtol=1e-5)


def test_row_adagrad_equals_fbgemms():
    """FBGEMM's fused operator is what TorchRec trains with."""
    fbgemm = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")      # there are builds for Linux only
    reference = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(
        [(9, 4, fbgemm.EmbeddingLocation.HOST, fbgemm.ComputeDevice.CPU)], optimizer=fbgemm.OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.3, eps=1e-10)
    start = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    reference.split_embedding_weights()[0].copy_(start)
    table = torch.nn.Parameter(start.clone())
    optimizer = book.RowAdagrad([table], lr=0.3)
    for step in range(5):
        ids, values = rows_and_gradients(step)
        (reference(ids, torch.arange(len(ids) + 1)) * values).sum().backward()
        give_gradient(table, ids, values)
        optimizer.step()
    assert torch.allclose(table.detach(), reference.split_embedding_weights()[0], atol=1e-6)


def test_dense_parameters_get_pytorchs_adagrad():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizers = book.RowAdagrad([ours], lr=0.1), torch.optim.Adagrad([theirs], lr=0.1)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(3, 2)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs)


def test_a_step_leaves_other_rows_alone_and_keeps_one_number_a_row():
    _, stacked = twins()
    optimizer, start = book.RowAdagrad(stacked.parameters(), lr=0.1), stacked.tables.weight.detach().clone()
    one_step(stacked, optimizer, batch_of([[[0], [2]], [[1], [1]], [[5], []]]))
    assert stacked.tables.weight.grad.is_sparse
    changed = (stacked.tables.weight != start).any(1).nonzero()[:, 0].tolist()
    assert changed == [0, 2, 8, 16]                             # rows of the stack: 7 and 11 is where tables 1 and 2 start
    assert optimizer.state[stacked.tables.weight]["sum"].shape == (sum(SIZES),)


def test_bfloat16_stays_close_and_keeps_weights_in_32_bits():
    taught, stacked = twins(bfloat16=True)
    batch = batch_of([[[i % size] for i in range(16)] for size in SIZES])
    logits = stacked(*batch[:3])
    assert logits.dtype == torch.float32 and torch.allclose(taught(*batch[:3]), logits, atol=0.02)
    one_step(stacked, book.RowAdagrad(stacked.parameters(), lr=0.1), batch)
    assert all(p.dtype == torch.float32 for p in stacked.parameters())


def test_bfloat16_harms_no_log_loss(tmp_path):
    write_toy_criteo(tmp_path / "toy.txt", 30_000)
    data = preprocess_criteo(tmp_path / "toy.txt", tmp_path / "toy.npz", min_count=5, progress=False)
    losses = []
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        model = book.StackedDLRM(data.table_sizes, 8, [32], [32], bfloat16=bfloat16)
        book.train(model, data.batch, data.train, book.RowAdagrad(model.parameters(), lr=0.03), 128)
        losses.append(book.evaluate(model, data.batch(data.test))["log_loss"])
    assert abs(losses[0] - losses[1]) < 0.004


def test_hashed_and_quotient_remainder_tables_equal_loops():
    bags = [[[6, 0], [], [5, 5, 3]], [[3], [2], [1]], [[10, 4], [9], []]]
    batch = batch_of(bags)
    torch.manual_seed(0)
    hashed = book.HashedTables([3, 3, 3], 5)
    divided = book.QuotientRemainderTables(SIZES, 5, m=3)
    for table in divided.quotients:
        torch.nn.init.normal_(table.weight)
    for t, column in enumerate(bags):
        for b, bag in enumerate(column):
            by_hash = sum((hashed[t].weight[i % 3] for i in bag), torch.zeros(5))
            by_parts = sum((divided.quotients[t].weight[i // 3] * divided.remainders[t].weight[i % 3] for i in bag), torch.zeros(5))
            assert torch.allclose(hashed(*batch[1:3])[b, t], by_hash, atol=1e-6)
            assert torch.allclose(divided(*batch[1:3])[b, t], by_parts, atol=1e-6)
    pairs = {(i // 3, i % 3) for i in range(11)}
    assert len(pairs) == 11                                     # no two ids share both rows


def test_rounded_to_int8_are_off_by_half_a_step_at_most():
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rounded, step = book.rounded_to_int8(weight), weight.abs().amax(1, keepdim=True) / 127
    assert ((weight - rounded).abs() <= step / 2 + 1e-7).all() and not rounded[3].any()
    assert all(len(set(((row / s).round().tolist()))) <= 255 for row, s in zip(rounded[:3], step[:3]))


def test_prefetched_keeps_order_raises_and_ends():
    assert list(prefetched(range(100))) == list(range(100)) and list(prefetched([])) == []

    def breaks():
        yield 1
        raise OSError("the disk is gone")

    items = prefetched(breaks())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    made = []
    for item in prefetched(made.append(k) or k for k in range(1000)):
        if item == 3:
            break
    assert len(made) < 20                                       # it does not run ahead of what is asked for


def test_optimizer_state_survives_a_checkpoint(tmp_path):
    _, stacked = twins()
    optimizer = book.RowAdagrad(stacked.parameters(), lr=0.1)
    batch = batch_of([[[0], [2]], [[1], [1]], [[5], []]])
    one_step(stacked, optimizer, batch)
    book.save_checkpoint(tmp_path / "c.pt", stacked, optimizer, 1)
    other = copy.deepcopy(stacked)
    other_optimizer = book.RowAdagrad(other.parameters(), lr=0.1)
    assert book.load_checkpoint(tmp_path / "c.pt", other, other_optimizer)["step"] == 1
    one_step(stacked, optimizer, batch)
    one_step(other, other_optimizer, batch)
    assert all(map(torch.equal, stacked.state_dict().values(), other.state_dict().values()))
