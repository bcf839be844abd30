"""The training that `test_long_run` kills: a module of its own, which a fork server loads once."""

import contextlib

import torch
import torch._dynamo  # else an optimizer imports it at its first step, in two seconds

import dlrm_models
import dlrm_utils

notebook = dlrm_models.load_notebook()
torch.sparse.check_sparse_tensor_invariants.disable()


@contextlib.contextmanager
def one_thread():
    """The same bits in every process need the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@one_thread()
def run(processed, folder, batch_size=256, stop=None):
    """Two epochs of a small stacked model, a checkpoint every 25 steps.

    Returns the model, its history, and how many steps this call took.
    """
    data = dlrm_utils.load_criteo(processed)
    torch.manual_seed(0)
    model = notebook.StackedDLRM(data.table_sizes, 8, [16], [16])
    optimizer = notebook.RowAdagrad(model.parameters(), lr=0.02)
    settings = {"every": 25, "num_epochs": 2, "stop": stop}
    return model, *notebook.train_long(model, optimizer, data, batch_size, folder, **settings)
