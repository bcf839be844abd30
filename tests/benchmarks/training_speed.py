"""Training speed at the size of the paper's Kaggle model, batches of 128 and 2048, in one run.

26 tables of together 33,762,577 rows of 16, bottom MLP 512-256-64, top MLP 512-256. The notebook's
26 tables, its stacked model, TorchRec with FBGEMM's fused optimizers and, if a checkout of it is
given, Facebook's own script take turns; medians over steps. Toy clicks as batches, in memory.

    python tests/benchmarks/training_speed.py [--facebook CHECKOUT] [--largest-table ROWS]

CHECKOUT is a clone of github.com/facebookresearch/dlrm. Writes figures/measured/training_speed.csv,
unless tables are cut by --largest-table. Some 5 minutes and 20 GB of memory.
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from shared import LAYERS, bfloat16_or_say_so, dlrm_utils, notebook, save, toy_clicks

STEPS = 10  # of each way in a round
# What Facebook's script imports, and a training step does not need.
NOT_NEEDED = ["mlperf_logging", "torch.utils.tensorboard", "tqdm"]


def toy_batches(batch_size, count, table_sizes):
    """Batches of toy clicks; an id is the rank of its name, modulo the table's rows."""
    truth, rng = toy_clicks.ToyTruth(0), np.random.default_rng(batch_size)
    for _ in range(count):
        dense, ranks = truth.draw(rng, batch_size)
        ids = torch.from_numpy(np.maximum(ranks, 0) % table_sizes).T.contiguous()  # (26, B)
        labels = torch.from_numpy((rng.random(batch_size) < 0.25).astype(np.float32))
        numbers = torch.from_numpy(np.log1p(np.maximum(dense, 0)).astype(np.float32))
        offsets = [torch.arange(batch_size)] * len(ids)
        yield dlrm_utils.Batch(numbers, list(ids), offsets, labels)


def step_of(model, optimizer):
    """One training step as the notebook's `train` makes it."""

    def step(batch):
        loss = binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def notebook_steps(sizes, narrow):
    """Name to training step. The stacked ways share one model's tables."""
    torch.manual_seed(0)
    taught = notebook.DLRM(sizes, 16, *LAYERS["paper"])
    wide = notebook.StackedDLRM(sizes, 16, *LAYERS["paper"])
    steps = {
        "26 tables, SGD": step_of(taught, torch.optim.SGD(taught.parameters(), lr=0.01)),
        "stacked, 32 bits, SGD": step_of(wide, torch.optim.SGD(wide.parameters(), lr=0.01)),
    }
    fast, precision = wide, "32 bits"
    if narrow:
        fast, precision = (
            notebook.StackedDLRM([1] * 26, 16, *LAYERS["paper"], bfloat16=True),
            "bfloat16",
        )
        fast.tables = wide.tables
        sgd = torch.optim.SGD(fast.parameters(), lr=0.01)
        steps["stacked, bfloat16, SGD"] = step_of(fast, sgd)
    adagrad = notebook.RowAdagrad(fast.parameters(), lr=0.01)
    steps[f"stacked, {precision}, row-wise Adagrad"] = step_of(fast, adagrad)
    return steps


def torchrec_step(kind, sizes):
    """One step of TorchRec's DLRM on this one process; its tables are updated within backward."""
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import (
        EmbeddingShardingPlanner,
        ParameterConstraints,
        Topology,
    )
    from torchrec.models.dlrm import DLRM
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    from dlrm_torchrec import to_keyed_jagged

    tables = [
        EmbeddingBagConfig(
            name=f"t{t}", embedding_dim=16, num_embeddings=size, feature_names=[f"t{t}"]
        )
        for t, size in enumerate(sizes)
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    bottom, top = LAYERS["paper"]
    model = DLRM(collection, 13, [*bottom, 16], [*top, 1])
    fused = {"optimizer": kind, "learning_rate": 0.01}
    sharder = EmbeddingBagCollectionSharder(fused_params=fused)
    whole = {table.name: ParameterConstraints(sharding_types=["table_wise"]) for table in tables}
    topology = Topology(world_size=1, compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology, constraints=whole).plan(model, [sharder])
    cpu = torch.device("cpu")
    model = DistributedModelParallel(model, device=cpu, sharders=[sharder], plan=plan)
    mlps = [p for name, p in model.named_parameters() if "sparse_arch" not in name]
    optimizer = torch.optim.SGD(mlps, lr=0.01)

    def forward(dense, indices, offsets):
        batch = dlrm_utils.Batch(dense, indices, offsets, None)
        return model(dense, to_keyed_jagged(batch)).squeeze(1)

    return step_of(forward, optimizer)


def torchrec_steps(sizes):
    """Name to training step, or nothing, and a sentence, where TorchRec is not installed."""
    if importlib.util.find_spec("torchrec") is None:
        print("TorchRec is not installed (requirements-torchrec.txt): left out.")
        return {}
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    kinds = {"SGD": EmbOptimType.EXACT_SGD, "row-wise Adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    return {f"TorchRec, {name}": torchrec_step(kind, sizes) for name, kind in kinds.items()}


def facebook_steps(checkout, sizes):
    """Name to training step of `dlrm_s_pytorch.py`, with its own model, loss and optimizer."""
    if checkout is None:
        print("Facebook's script is left out: --facebook takes the path of a checkout of it.")
        return {}
    if not (checkout / "dlrm_s_pytorch.py").exists():
        raise SystemExit(f"{checkout} holds no dlrm_s_pytorch.py: give the folder of the checkout")
    absent = {name: mock.MagicMock() for name in NOT_NEEDED if not can_be_imported(name)}
    with (
        mock.patch.dict(sys.modules, absent),
        mock.patch.object(sys, "path", [str(checkout), *sys.path]),
    ):
        script = importlib.import_module("dlrm_s_pytorch")
    bottom, top = LAYERS["paper"]
    top_widths = np.array([16 + 27 * 26 // 2, *top, 1])
    model = script.DLRM_Net(
        m_spa=16,
        ln_emb=np.array(sizes),
        ln_bot=np.array([13, *bottom, 16]),
        ln_top=top_widths,
        arch_interaction_op="dot",
        sigmoid_bot=-1,
        sigmoid_top=len(top_widths) - 2,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_of = torch.nn.BCELoss(reduction="mean")

    def step(batch):
        probabilities = model(batch.dense, torch.stack(batch.offsets), batch.indices)
        loss = loss_of(probabilities, batch.labels[:, None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {"Facebook's script, SGD": step}


def can_be_imported(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def flops_per_row():
    """Operations of the MLPs for one example: forwards, and twice as many backwards."""
    with torch.device("meta"):
        model = notebook.DLRM([1] * 26, 16, *LAYERS["paper"])
    layers = [layer for part in (model.bottom, model.top) for layer in part]
    return 6 * sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))


def seconds_of(call, *arguments):
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def measure(steps, batch_size, rounds, sizes):
    """Median rows a second of each way, and of the limit that 32-bit products alone would set.

    The ways take turns, so that a slow moment of the machine hits all; a first round, and the first
    two steps of each turn, warm up.
    """
    a, b = torch.randn(2048, 512), torch.randn(512, 512)
    times, products = {way: [] for way in steps}, []
    for turn in range(rounds + 1):
        batches = list(toy_batches(batch_size, STEPS + 2, sizes))
        for way, step in steps.items():
            products.append(seconds_of(torch.matmul, a, b))
            seconds = [seconds_of(step, batch) for batch in batches]
            times[way] += seconds[2:] if turn else []
    rates = {way: batch_size / np.median(seconds) for way, seconds in times.items()}
    limit = 2 * len(a) * b.numel() / np.median(products) / flops_per_row()
    return rates | {"32-bit products alone": limit}


def parsed(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facebook", type=Path, metavar="CHECKOUT")
    parser.add_argument("--largest-table", type=int, metavar="ROWS")
    parser.add_argument("--rounds", type=int, default=5, help=f"of {STEPS} steps each")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parsed(arguments)
    sizes = dlrm_utils.CRITEO_KAGGLE_TABLE_SIZES
    if options.largest_table:
        sizes = np.minimum(sizes, options.largest_table).tolist()
    narrow = bfloat16_or_say_so()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        steps = facebook_steps(options.facebook, sizes)
        steps |= notebook_steps(sizes, narrow) | torchrec_steps(sizes)
        rates = {size: measure(steps, size, options.rounds, sizes) for size in (128, 2048)}
        torch.distributed.destroy_process_group()
    table = pd.DataFrame(rates).rename_axis("way").round().astype(int)
    print(table.rename(columns="batch {}".format).to_string())
    measured = table.drop("32-bit products alone").reset_index()
    measured = measured.melt("way", var_name="batch", value_name="rows a second")
    columns = ["data", "batch", "way", "rows a second"]
    save(measured.assign(data="toy")[columns], "training_speed", not options.largest_table)


if __name__ == "__main__":
    main()
