"""Train the notebook's DLRM on several processes: TorchRec splits the tables, copies the MLPs, and does the butterfly shuffle of section 15.

    torchrun --nproc-per-node 2 dlrm_torchrec.py data/criteo.npz --checkpoints build/torchrec
    python dlrm_torchrec.py --plan-only 64

gloo on CPUs, NCCL on GPUs, one process each. Every process (rank) opens the same processed Criteo file and reads its share of each batch. The model,
its training loop and its scores are the notebook's own; TorchRec takes the place of the tables. Started again, it goes on from its
last checkpoint, with any number of processes. Checkpoints hold the notebook's weights: `DLRM.load_state_dict(torch.load(path)["model"])`.
"""
import argparse
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"                             # one progress bar, rank 0's; tqdm reads this when it is imported
sys.path.insert(0, str(Path(__file__).resolve().parent / "tests"))
import dlrm_utils
import notebook_definitions

# Rows of the Terabyte set's 26 tables, capped at 40 million, as MLPerf's DLRM benchmark has them; together 204,184,588.
TERABYTE_TABLE_SIZES = [40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14,
                        40000000, 40000000, 40000000, 590152, 12973, 108, 36]
# TorchRec could also copy small tables to all ranks, but would then leave their updates to us.
SHARDINGS = {"auto": ["table_wise", "row_wise"], "table-wise": ["table_wise"], "row-wise": ["row_wise"]}
OPTIMIZERS = {"row-wise-adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "sgd": EmbOptimType.EXACT_SGD}


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which on CPU does not offer to split tables by rows, although its operators can."""

    def sharding_types(self, compute_device_type):
        return ["table_wise", "row_wise"]


class ShardedTables(nn.Module):
    """What the notebook's `EmbeddingTables` does, by TorchRec: from a KeyedJaggedTensor to vectors (B, T, D)."""

    def __init__(self, table_sizes, width):
        super().__init__()
        self.names = [f"t{t}" for t in range(len(table_sizes))]
        configs = [EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=size, embedding_dim=width)
                   for name, size in zip(self.names, table_sizes)]
        self.bags = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))

    def forward(self, keyed, _):
        by_name = self.bags(keyed).to_dict()
        return torch.stack([by_name[name] for name in self.names], dim=1)


class Optimizers:
    """TorchRec's fused table optimizer and the notebook's optimizer of the MLPs, with one learning rate for `train` to set."""

    def __init__(self, tables, mlps):
        self.tables, self.mlps, self.defaults, self.param_groups = tables, mlps, mlps.defaults, mlps.param_groups

    def zero_grad(self):
        for group in self.tables.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.tables.zero_grad()                                  # hands that rate to the operator that updates within backward
        self.mlps.zero_grad()

    def step(self):
        self.mlps.step()


def plan_tables(model, sharder, world_size, sharding, compute_device, **topology):
    """TorchRec's plan: which rank holds which part of which table."""
    names = [name for module in model.modules() if isinstance(module, ShardedTables) for name in module.names]
    wanted = {name: ParameterConstraints(sharding_types=SHARDINGS[sharding], compute_kernels=["fused"]) for name in names}
    planner = EmbeddingShardingPlanner(topology=Topology(world_size, compute_device, **topology), constraints=wanted, debug=False)
    return planner.collective_plan(model, [sharder], dist.group.WORLD) if dist.is_initialized() else planner.plan(model, [sharder])


def sharded_model(book, table_sizes, arguments, device):
    """The notebook's DLRM with TorchRec's tables, spread over all ranks, and its optimizers."""
    model = book.DLRM([1] * len(table_sizes), arguments.width, arguments.bottom, arguments.top)
    model.tables = ShardedTables(table_sizes, arguments.width)
    kind = OPTIMIZERS[arguments.optimizer]
    sharder = Sharder(fused_params={"optimizer": kind, "learning_rate": arguments.learning_rate, "eps": 1e-10})
    plan = plan_tables(model, sharder, dist.get_world_size(), arguments.sharding, device.type)
    model = DistributedModelParallel(model, device=device, sharders=[sharder], plan=plan)
    mlps = [parameter for name, parameter in model.named_parameters() if not name.startswith("tables.")]
    own = {"sgd": book.RowSGD, "row-wise-adagrad": book.RowAdagrad}[arguments.optimizer]
    return model, Optimizers(model.fused_optimizer, own(mlps, lr=arguments.learning_rate))


# ---- Weights: from all ranks to one file, and back ------------------------------------------------------------------

def named_weights(model):
    """The notebook's names of all weights, and TorchRec's tensors; the tables are spread over the ranks."""
    return {name.replace("tables.bags.embedding_bags.t", "tables."): value for name, value in sorted(model.state_dict().items())}


def table_sums(optimizers):
    """Adagrad's sums of squares: for each table of which this rank holds rows, its parts of them."""
    sums = {}
    for name, state in optimizers.tables.state_dict()["state"].items():
        for key, value in state.items():
            if "momentum" in key:
                sums[name.replace("tables.bags.embedding_bags.t", "tables.")] = parts_here(value)
    return sums


def parts_here(value):
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]


def shards_of(table, mine):
    """For each shard of a spread table: the rank that holds it, its rows, and on that rank its part out of `mine`."""
    mine = iter(mine)
    for shard in table.metadata().shards_metadata:
        owner, start, rows = shard.placement.rank(), shard.shard_offsets[0], shard.shard_sizes[0]
        part = next(mine) if owner == dist.get_rank() else None
        if rows:                                                 # a table of few rows may leave a rank without any
            yield owner, slice(start, start + rows), part


def collect(table, mine, row_shape):
    """On rank 0, the whole of what the ranks hold for a table, `row_shape` for each row: its weights, or its sums of squares."""
    rank, everything = dist.get_rank(), torch.empty(table.size()[0], *row_shape) if dist.get_rank() == 0 else None
    for owner, rows, part in shards_of(table, mine):
        if rank == 0:
            if part is None:
                part = torch.empty(rows.stop - rows.start, *row_shape, device="cuda" if torch.cuda.is_available() else "cpu")
                dist.recv(part, src=owner)
            everything[rows] = part.reshape(-1, *row_shape).cpu()
        elif owner == rank:
            dist.send(part.reshape(-1, *row_shape).contiguous(), dst=0)
    return everything


def save(path, model, optimizers, **more):
    """All of it into one file, by rank 0: to a temporary name, then renamed."""
    weights, names = named_weights(model), {parameter: name for name, parameter in model.named_parameters()}
    tables = {name: table for name, table in weights.items() if isinstance(table, ShardedTensor)}
    state = {name: collect(table, parts_here(table), table.size()[1:]) for name, table in tables.items()}
    state |= {name: weight.detach().cpu() for name, weight in weights.items() if name not in tables}
    sums, mine = {names[p]: kept["sum"].cpu() for p, kept in optimizers.mlps.state.items()}, table_sums(optimizers)
    if sums:                                                     # SGD keeps none
        sums |= {name: collect(table, mine.get(name, []), ()) for name, table in tables.items()}
    if dist.get_rank() == 0:
        torch.save(dict(model=state, sums=sums, **more), f"{path}.part")
        os.replace(f"{path}.part", path)
    dist.barrier()


@torch.no_grad()
def load(path, model, optimizers=None, settings=None):
    """Weights (and sums of squares) of a checkpoint, the notebook's or `save`'s, into this rank's parts; returns the checkpoint."""
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if settings is not None and checkpoint.get("settings") != settings:
        raise SystemExit(f"{path} was made with {checkpoint.get('settings')}, not with {settings}: use those, or another folder")
    weights, mine = named_weights(model), table_sums(optimizers) if optimizers else {}
    wrong = [name for name, weight in weights.items() if name not in checkpoint["model"] or checkpoint["model"][name].shape != weight.size()]
    if wrong:
        raise SystemExit(f"{path} does not fit this model: {', '.join(wrong[:3])} is missing or has another shape")
    for name, weight in weights.items():
        if not isinstance(weight, ShardedTensor):
            weight.copy_(checkpoint["model"][name])
            continue
        for kind, parts in [("model", parts_here(weight)), ("sums", mine.get(name, []))]:
            if parts:
                for owner, rows, part in shards_of(weight, parts):
                    if part is not None:
                        part.copy_(checkpoint[kind][name][rows].reshape(part.shape))
    if optimizers:
        for name, parameter in model.named_parameters():
            if name in checkpoint["sums"] and not name.startswith("tables."):
                optimizers.mlps.state[parameter]["sum"] = checkpoint["sums"][name].to(parameter.device, copy=True)
    return checkpoint


# ---- Training ---------------------------------------------------------------------------------------------------

class KeyedBatch(NamedTuple):
    """A `Batch` whose ids are one KeyedJaggedTensor; in its place `offsets` is empty."""
    dense: torch.Tensor
    indices: object
    offsets: None
    labels: torch.Tensor

    def to(self, device):
        return KeyedBatch(self.dense.to(device), self.indices.to(device), None, self.labels.to(device))


def keyed(batch):
    return KeyedBatch(batch.dense, dlrm_utils.to_keyed_jagged(batch), None, batch.labels)


def evaluate(book, model, data, rows, device, chunk=4096):
    """The notebook's scores on rows of the file, every rank predicting its share; on rank 0, None elsewhere."""
    rank, world, pieces = dist.get_rank(), dist.get_world_size(), []
    rows = rows[:len(rows) // world * world]                     # all ranks need equal shares
    share = rows[rank * len(rows) // world:(rank + 1) * len(rows) // world]
    with torch.no_grad():
        for start in range(0, len(share), chunk):
            batch = keyed(data.batch(share[start:start + chunk])).to(device)
            pieces.append(torch.sigmoid(model(*batch[:3])))
    gathered = [torch.empty(len(share), device=device) for _ in range(world)]
    dist.all_gather(gathered, torch.cat(pieces))
    return book.score(data.labels[rows.start:rows.stop], torch.cat(gathered).cpu().numpy()) if rank == 0 else None


def run(arguments):
    """Train, evaluate and save; returns rank 0's history of [step, log loss on validation rows]."""
    book, rank, world = notebook_definitions.load(), dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    data, folder = dlrm_utils.load_criteo(arguments.processed), Path(arguments.checkpoints)
    if arguments.batch_size % world:
        raise SystemExit(f"--batch-size {arguments.batch_size} is shared by {world} processes: it must be a multiple of {world}")
    rows = data.train[:len(data.train) // arguments.batch_size * arguments.batch_size]      # without an incomplete last batch
    model, optimizers = sharded_model(book, data.table_sizes, arguments, device)
    settings = {name: getattr(arguments, name) for name in ("batch_size", "epochs", "seed", "optimizer", "learning_rate")} | dict(rows=len(data))
    start, history = 0, []
    if (folder / "last.pt").exists():
        saved = load(folder / "last.pt", model, optimizers, settings)
        start, history = saved["step"], saved["history"]
        print(f"going on from step {start}") if rank == 0 else None
    else:
        torch.manual_seed(arguments.seed)
        weights = arguments.weights or folder / "start.pt"
        if rank == 0 and not arguments.weights:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = book.DLRM(data.table_sizes, arguments.width, arguments.bottom, arguments.top)
            torch.save(dict(model=fresh.state_dict()), weights)
        dist.barrier()
        load(weights, model)
    total = arguments.epochs * len(rows) // arguments.batch_size
    sample = data.validation[:50_000]

    def after_step(step, logits, labels):
        if (step + 1) % arguments.every == 0 or step + 1 == total:
            scores = evaluate(book, model, data, sample, device)
            history.append([step + 1, scores["log_loss"] if rank == 0 else None])
            save(folder / "last.pt", model, optimizers, step=step + 1, history=history, settings=settings)
            if rank == 0:
                print(f"step {step + 1:,} of {total:,}: log loss {scores['log_loss']:.4f}, AUC {scores['auc']:.4f}, "
                      f"base rate {scores['base_rate']:.3f}", flush=True)

    get_batch = lambda numbers: keyed(data.batch(numbers[rank::world]))                      # this rank's share of the samples
    began = time.perf_counter()
    losses = book.train(model, get_batch, rows, optimizers, arguments.batch_size, arguments.epochs, arguments.seed,
                        start, arguments.stop, after_step)
    if rank == 0:
        seconds = time.perf_counter() - began
        print(f"{len(losses):,} steps in {seconds:.1f} s, evaluations and checkpoints included: "
              f"{len(losses) * arguments.batch_size / seconds:,.0f} rows/s with {world} processes", flush=True)
    return losses, history


def print_plan(world_size, width):
    """The plan for a cluster that is not there: GPUs of 80 GB, eight a machine, the Terabyte tables."""
    model = nn.Sequential(ShardedTables(TERABYTE_TABLE_SIZES, width))
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    gigabyte = 1024 ** 3
    print(f"{sum(TERABYTE_TABLE_SIZES):,} rows of {width} numbers: {sum(TERABYTE_TABLE_SIZES) * width * 4 / gigabyte:.1f} GiB, on {world_size} GPUs of 80 GiB")
    try:
        plan = plan_tables(model, Sharder(fused_params=fused), world_size, "auto", "cuda",
                           hbm_cap=80 * gigabyte, local_world_size=min(8, world_size))
    except PlannerError as error:
        raise SystemExit(f"It does not fit: {str(error).splitlines()[0]}")
    held, kinds = np.zeros(world_size), {}
    for tables in plan.plan.values():
        for name, parameter in tables.items():
            kinds.setdefault(parameter.sharding_type, []).append(name)
            for shard in parameter.sharding_spec.shards if parameter.sharding_spec else []:
                held[shard.placement.rank()] += 4 * np.prod(shard.shard_sizes) / gigabyte
    for kind, names in kinds.items():
        print(f"{kind}: {len(names)} tables ({', '.join(names)})")
    print(f"tables on the fullest GPU {held.max():.2f} GiB, on the emptiest {held.min():.2f} GiB")


def parsed(command_line):
    numbers = lambda text: [int(number) for number in text.split("-")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("processed", nargs="?", help="the processed Criteo file")
    parser.add_argument("--checkpoints", default="build/torchrec", help="folder of the checkpoints")
    parser.add_argument("--weights", help="start from the weights in this checkpoint, the notebook's or one of this program")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples of one step, of all processes together")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="row-wise-adagrad")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--sharding", choices=SHARDINGS, default="auto", help="auto: TorchRec's planner decides")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--every", type=int, default=2000, help="steps between evaluations and checkpoints")
    parser.add_argument("--stop", type=int, help="stop after this step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=16, help="width of the embeddings")
    parser.add_argument("--bottom", type=numbers, default=[512, 256, 64], help="hidden layers, for example 512-256-64")
    parser.add_argument("--top", type=numbers, default=[512, 256])
    parser.add_argument("--plan-only", type=int, metavar="GPUS", help="print TorchRec's plan for the Terabyte tables on so many GPUs")
    return parser.parse_args(command_line)


def main(command_line=None):
    logging.disable(logging.WARNING)                             # TorchRec warns of what it does by design
    warnings.simplefilter("ignore")
    arguments = parsed(command_line)
    if arguments.plan_only:
        return print_plan(arguments.plan_only, 128)
    if not arguments.processed:
        raise SystemExit("name the processed Criteo file: dlrm_torchrec.py data/criteo.npz (made by dlrm_utils.py preprocess)")
    again = f"the same command, started again, goes on from the last checkpoint in {arguments.checkpoints}"
    ended = f"rank {os.environ.get('RANK', 0)}: ended by torchrun, which was stopped, or another process is gone; {again}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ended))    # so torchrun ends the others when one rank is lost
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        return run(arguments)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped: {again}" if dist.get_rank() == 0 else 130)
    except RuntimeError as error:
        if "closed by peer" in str(error) or "Connection" in str(error):
            raise SystemExit(f"rank {dist.get_rank()}: another process is gone; {again}")
        raise
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
