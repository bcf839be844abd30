"""Ways to make embedding tables smaller: their bytes and their log loss, three seeds each.

200,000 toy examples (a number as argument gives another), names seen fewer than ten times unknown.
Each model trains on the first 60,000 (batch 256, Adagrad at 0.04) and is measured on the test part.
Writes figures/measured/smaller_tables.csv. Some 2 minutes.
"""

import math
import sys
import tempfile

import numpy as np
import pandas as pd
import torch

from shared import BATCH_SIZE, SEEDS, notebook, save, toy_data

WIDTH, NARROW, LARGE = 16, 4, 100


class HashedTables(notebook.EmbeddingTables):
    """Ids modulo the rows that there are: some names share a vector."""

    def forward(self, indices, offsets):
        hashed = [i % table.num_embeddings for i, table in zip(indices, self, strict=True)]
        return super().forward(hashed, offsets)  # (B, T, D)


class QuotientRemainderTables(torch.nn.Module):
    """A row of id // m times a row of id % m, number by number: no two names share both."""

    def __init__(self, table_sizes, width, m):
        super().__init__()
        self.m = m
        cut = [min(size, m) for size in table_sizes]
        groups = [math.ceil(size / m) for size in table_sizes]
        self.remainders = notebook.EmbeddingTables(cut, width)
        self.quotients = notebook.EmbeddingTables(groups, width)
        for table in self.quotients:
            torch.nn.init.ones_(table.weight)

    def forward(self, indices, offsets):
        tables, bags = zip(self.quotients, self.remainders, strict=True), []
        for (q, r), i, o in zip(tables, indices, offsets, strict=True):
            each = torch.arange(len(i), device=i.device)
            rows = q(i // self.m, each) * r(i % self.m, each)  # (nnz, D)
            bags.append(torch.nn.functional.embedding_bag(each, rows, o, mode="sum"))
        return torch.stack(bags, dim=1)  # (B, T, D)


class MixedTables(torch.nn.Module):
    """Tables of more than LARGE rows are NARROW wide, and a matrix widens what was read."""

    def __init__(self, table_sizes):
        super().__init__()
        widths = [NARROW if size > LARGE else WIDTH for size in table_sizes]
        self.tables = torch.nn.ModuleList(
            notebook.EmbeddingTables([size], width)
            for size, width in zip(table_sizes, widths, strict=True)
        )
        self.matrices = torch.nn.ModuleList(
            torch.nn.Linear(NARROW, WIDTH, bias=False) if width == NARROW else torch.nn.Identity()
            for width in widths
        )

    def forward(self, indices, offsets):
        parts = zip(self.tables, self.matrices, indices, offsets, strict=True)
        return torch.cat([widen(table([i], [o])) for table, widen, i, o in parts], dim=1)


def rounded(weight, bits):
    """Rows rounded to whole multiples of a scale of their own; 32-bit floats again."""
    largest = 2 ** (bits - 1) - 1  # 127 in 8 bits
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / largest
    return (weight / scale).round() * scale


def new_tables(sizes):
    """Name to tables, all of them fresh."""
    return {
        "full": notebook.EmbeddingTables(sizes, WIDTH),
        "hashed, 64 rows": HashedTables(np.minimum(sizes, 64).tolist(), WIDTH),
        "hashed, 8 rows": HashedTables(np.minimum(sizes, 8).tolist(), WIDTH),
        "quotient, remainder 64": QuotientRemainderTables(sizes, WIDTH, m=64),
        "mixed, 4 or 16 wide": MixedTables(sizes),
    }


def results_of_seed(data, seed):
    """One row a way: its bytes and its log loss."""
    test = data.batch(data.test)
    torch.manual_seed(seed)
    for way, tables in new_tables(data.table_sizes).items():
        torch.manual_seed(seed)
        model = notebook.DLRM(data.table_sizes, WIDTH, [64], [64])
        model.tables = tables
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.04)
        rows = data.train[:60_000]
        notebook.train(model, data.batch, rows, optimizer, BATCH_SIZE, seed=seed)
        size = 4 * notebook.count(tables)
        yield {"way": way, "seed": seed, "bytes": size, "log_loss": log_loss(model, test)}
        if way != "full":
            continue
        exact = [table.weight.data for table in tables]
        for bits in (8, 3):
            for table, weight in zip(tables, exact, strict=True):
                table.weight.data = rounded(weight, bits)
            size = notebook.count(tables) * bits // 8 + 4 * sum(data.table_sizes)  # a scale a row
            rounded_way = f"full, as int{bits}"
            loss = log_loss(model, test)
            yield {"way": rounded_way, "seed": seed, "bytes": size, "log_loss": loss}


def log_loss(model, batch):
    return round(notebook.evaluate(model, batch)["log_loss"], 5)


def main(rows=200_000):
    with tempfile.TemporaryDirectory() as folder:
        data, _ = toy_data(folder, rows)
        table = pd.DataFrame([row for seed in SEEDS for row in results_of_seed(data, seed)])
    save(table, "smaller_tables", rows == 200_000)
    losses = table.groupby(["way", "bytes"])["log_loss"]
    print(losses.agg(["mean", "std"]).round(4).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
