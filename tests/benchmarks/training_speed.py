"""Training speed at the size of the paper's Kaggle model: 26 tables with 33,762,577 rows of 16, bottom 512-256-64, top 512-256, batches of 128 and 2048.

The taught 26-bag model, the stacked one of section 14, and TorchRec's DLRM with FBGEMM's fused optimizers, on CPU. The ways take turns, so
that a slow minute of the machine hits all of them; medians over steps. Toy clicks as batches, in memory. Writes figures/measured/training_speed.csv.
"""
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRM as TorchRecDLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions

book = notebook_definitions.load()
os.chdir(notebook_definitions.ROOT)
SIZES, LAYERS = book.dlrm_utils.CRITEO_KAGGLE_TABLE_SIZES, ([512, 256, 64], [512, 256])
ROUNDS, STEPS = 6, 12
torch.sparse.check_sparse_tensor_invariants.disable()


def toy_batches(batch_size, count):
    """Batches of toy clicks whose ids are the ranks of the names: as many table rows as Criteo's file has names."""
    truth, rng = book.dlrm_utils.ToyTruth(0), np.random.default_rng(batch_size)
    for _ in range(count):
        dense, ranks = truth.draw(rng, batch_size)
        labels = (rng.random(batch_size) < 0.25).astype(np.uint8)
        yield book.dlrm_utils._criteo_batch(dense, np.maximum(ranks, 0), labels)


def step_of(model, optimizer):
    """One training step as the notebook's `train` makes it."""
    def step(batch):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def torchrec_step(kind):
    """One training step of TorchRec's DLRM, sharded over this one process, tables updated within the backward pass."""
    tables = [EmbeddingBagConfig(name=f"t{t}", embedding_dim=16, num_embeddings=n, feature_names=[f"f{t}"]) for t, n in enumerate(SIZES)]
    model = TorchRecDLRM(EmbeddingBagCollection(tables=tables, device=torch.device("meta")), 13, [512, 256, 64, 16], [512, 256, 1])
    sharder = EmbeddingBagCollectionSharder(fused_params={"optimizer": kind, "learning_rate": 0.01})
    whole = {table.name: ParameterConstraints(sharding_types=["table_wise"]) for table in tables}
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"), constraints=whole)
    model = DistributedModelParallel(model, device=torch.device("cpu"), sharders=[sharder], plan=planner.plan(model, [sharder]))
    keys = [f"f{t}" for t in range(26)]
    dense_optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "sparse_arch" not in name], lr=0.01)

    def step(batch):
        lengths = torch.ones(26 * len(batch.dense), dtype=torch.int32)
        logits = model(batch.dense, KeyedJaggedTensor(keys=keys, values=torch.cat(batch.indices), lengths=lengths)).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        dense_optimizer.zero_grad()
        loss.backward()
        dense_optimizer.step()
    return step


def new_ways():
    """Name to training step. The stacked ways share one model's weights."""
    torch.manual_seed(0)
    taught = book.DLRM(SIZES, 16, *LAYERS)
    wide = book.StackedDLRM(SIZES, 16, *LAYERS)
    narrow = book.StackedDLRM([1] * 26, 16, *LAYERS, bfloat16=True)
    narrow.tables = wide.tables
    return {"26 tables, SGD": step_of(taught, torch.optim.SGD(taught.parameters(), lr=0.01)),
            "stacked, 32 bits, SGD": step_of(wide, book.RowSGD(wide.parameters(), lr=0.01)),
            "stacked, bfloat16, SGD": step_of(narrow, book.RowSGD(narrow.parameters(), lr=0.01)),
            "stacked, bfloat16, row-wise Adagrad": step_of(narrow, book.RowAdagrad(narrow.parameters(), lr=0.01)),
            "TorchRec, SGD": torchrec_step(EmbOptimType.EXACT_SGD),
            "TorchRec, row-wise Adagrad": torchrec_step(EmbOptimType.EXACT_ROWWISE_ADAGRAD)}


def product_gflops():
    """The rate of a 32-bit matrix product, 2048 x 512 x 512."""
    a, b = torch.randn(2048, 512), torch.randn(512, 512)
    started = time.perf_counter()
    a @ b
    return 2 * 2048 * 512 * 512 / (time.perf_counter() - started) / 1e9


def main():
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ways, results, products = new_ways(), [], []
        for batch_size in (128, 2048):
            times = {way: [] for way in ways}
            for round_number in range(ROUNDS):
                batches = list(toy_batches(batch_size, STEPS))
                for way, step in ways.items():
                    products.append(product_gflops())
                    for k, batch in enumerate(batches):
                        started = time.perf_counter()
                        step(batch)
                        if round_number and k > 1:                          # the first ones warm up
                            times[way].append(time.perf_counter() - started)
            results += [dict(data="toy", batch=batch_size, way=way, rate=round(batch_size / np.median(t))) for way, t in times.items()]
        torch.distributed.destroy_process_group()
    table = pd.DataFrame(results).rename(columns={"rate": "rows a second"})
    table.to_csv("figures/measured/training_speed.csv", index=False)
    baseline = table[table["way"] == "26 tables, SGD"].set_index("batch")["rows a second"]
    table["times the 26 tables"] = (table["rows a second"] / table["batch"].map(baseline)).round(2)
    flops = book.flops_per_row([13, 512, 256, 64, 16]) + book.flops_per_row([367, 512, 256, 1])
    print(table.to_string(index=False))
    print(f"32-bit products: median {np.median(products):.0f}, best {max(products):.0f} GFLOP/s: at most "
          f"{np.median(products) * 1e9 / flops:,.0f}, {max(products) * 1e9 / flops:,.0f} rows/s")


if __name__ == "__main__":
    main()
