"""Train the notebook's DLRM on several processes: TorchRec splits the tables and copies the MLPs.

    torchrun --nproc-per-node 2 dlrm_torchrec.py data/criteo --checkpoints build/torchrec
    python dlrm_torchrec.py --plan-only 64

One process (rank) a GPU with NCCL, or several on CPUs with gloo. A checkpoint is a folder of
safetensors and JSON, without pickled code, for any ranks to read.
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # one bar, rank 0's; read when torch or we first import tqdm

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import dlrm_utils
from dlrm_models import load_notebook

try:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from safetensors import SafetensorError
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.distributed import DistributedModelParallel, planner
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
except ModuleNotFoundError as error:
    raise ImportError(f"no {error.name}: install requirements-torchrec.txt, on Linux") from None

# Rows of the Terabyte set's 26 tables, capped at 40 million, as MLPerf's DLRM benchmark has them.
TERABYTE_TABLE_SIZES = [
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209,
    11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36]  # fmt: skip
STRATEGIES = {  # how to shard a table of over a million rows, and any other
    "table-wise": ("table_wise", "table_wise"),
    "row-wise": ("row_wise", "row_wise"),
    "big-row-wise": ("row_wise", "table_wise"),
    "table-row-wise": ("table_row_wise", "table_wise"),
}  # none cuts rows: row-wise Adagrad, with a sum for each part, would be another optimizer


# ---- Model and plan ------------------------------------------------------------------------------


class Sharder(EmbeddingBagCollectionSharder):
    """On CPUs TorchRec's does not offer to split rows, although its operators can."""

    def sharding_types(self, compute_device_type):
        return super().sharding_types("cuda")


class ShardedTables(torch.nn.Module):
    """The notebook's `EmbeddingTables` by TorchRec: a KeyedJaggedTensor to vectors (B, T, D)."""

    def __init__(self, table_sizes, width):
        super().__init__()
        self.names, configs = [f"t{t}" for t in range(len(table_sizes))], []
        for name, rows in zip(self.names, table_sizes, strict=True):
            configs.append(EmbeddingBagConfig(rows, width, name, feature_names=[name]))
        self.bags = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))

    def forward(self, keyed, _):
        by_name = self.bags(keyed).to_dict()
        return torch.stack([by_name[name] for name in self.names], dim=1)  # (B, T, D)


def planner_of(table_sizes, strategy, topology, batch_size=None, stats=None):
    """TorchRec's planner, held to a strategy."""
    fused = partial(planner.ParameterConstraints, compute_kernels=["fused"])
    big, small = (fused(sharding_types=[kind]) for kind in STRATEGIES[strategy])
    kept = {f"t{t}": big if rows > 1_000_000 else small for t, rows in enumerate(table_sizes)}
    return planner.EmbeddingShardingPlanner(topology, batch_size, constraints=kept, stats=stats)


def sharded_model(book, num_dense, table_sizes, arguments, device):
    """The notebook's DLRM, newly drawn, with its tables spread over all ranks; its optimizer."""
    torch.manual_seed(0)
    kind = dict(num_dense=num_dense, relu_after_bottom=arguments.relu_after_bottom)
    layers = arguments.width, arguments.bottom, arguments.top
    model = book.DLRM([1] * len(table_sizes), *layers, **kind)
    model.tables = ShardedTables(table_sizes, arguments.width)
    adagrad, rate = arguments.optimizer == "row-wise-adagrad", arguments.learning_rate
    kind = EmbOptimType.EXACT_ROWWISE_ADAGRAD if adagrad else EmbOptimType.EXACT_SGD
    sharder = Sharder(fused_params=dict(optimizer=kind, eps=1e-10, learning_rate=rate))
    topology = planner.Topology(dist.get_world_size(), device.type)
    plan = planner_of(table_sizes, arguments.sharding, topology).plan(model, [sharder])
    torch.manual_seed(1 + dist.get_rank())  # the MLPs are equal, the rows are not
    model = DistributedModelParallel(model, device=device, sharders=[sharder], plan=plan)
    mlps = [p for name, p in model.named_parameters() if not name.startswith("tables.")]
    optimizer = (book.RowAdagrad if adagrad else torch.optim.SGD)(mlps, lr=rate)
    for parameter in mlps if adagrad else ():  # now: a load fills only what it finds
        optimizer.state[parameter]["sum"] = torch.zeros_like(parameter)

    def pass_rate_on(*_):
        for group in model.fused_optimizer.param_groups:
            group["lr"] = optimizer.param_groups[0]["lr"]
        model.fused_optimizer.zero_grad()  # hands it to the operator that updates within backward

    model.register_forward_pre_hook(pass_rate_on)
    return model, optimizer


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together(where=""):
    """Bad input met within, on any rank, ends all of them; one says what it is."""
    problem = None
    try:
        yield
    except dcp.api.CheckpointException as failed:  # a BaseException, with every rank's traceback
        problem = str(next(iter(failed.failures.values()))[0])
    except (OSError, ValueError, SafetensorError, planner.types.PlannerError) as error:
        problem = str(error)
    first = next((rank for rank, told in enumerate(gathered(problem)) if told), None)
    if first is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun; all end by themselves
        raise SystemExit(f"rank {first}: {where}{problem}" if dist.get_rank() == first else 1)


# ---- Checkpoints ---------------------------------------------------------------------------------


def state_of(model, optimizer):
    """This rank's part of the weights, by the notebook's names, and of the sums, as sums.NAME."""
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        state |= {f"sums.{name}": sums for sums in optimizer.state.get(parameter, {}).values()}
    for name, kept in model.fused_optimizer.state_dict()["state"].items():
        state |= {f"sums.{name}": sums for sums in kept.values()}
    return {n.replace("tables.bags.embedding_bags.t", "tables."): t for n, t in state.items()}


def write_tensors(folder, state):
    """This rank's part of a state to files; it needs twice the memory of its biggest tensor."""
    names = [name for name in state if "sums." not in name]  # known to all ranks, unlike the sums
    files = {n: k if state[n].size().numel() > 2**22 else 1 for k, n in enumerate(names, 2)}
    files |= {f"sums.{name}": files[name] for name in names}
    writer = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())


def shapes_in(folder, state=()):
    """Shapes by name in a checkpoint; ValueError if a part of them, or of a state, is absent."""
    entries = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    shapes = {name: entry.size for name, entry in entries.items()}
    for name, shape in (shapes | {name: state[name].size() for name in state}).items():
        chunks = entries[name].chunks if name in entries else []
        if sum(chunk.sizes.numel() for chunk in chunks) != shape.numel():
            raise ValueError(f"a part of {name} is absent from {folder}; do all ranks share it?")
    return shapes


def newest(folder):
    """The newest complete checkpoint of a folder, or None; ValueError if it is used otherwise."""
    steps = sorted(folder.glob("step-*"))
    others = [path.name for path in folder.glob("*") if path.name != "saving"]
    if others and not steps:
        raise ValueError(f"{folder} holds {others[0]}, not checkpoints: name another folder")
    return steps[-1] if steps else None


def save(folder, state, about):
    """A checkpoint of all ranks, which counts once it is renamed to step-...; the last two stay."""
    part, first = folder / "saving", dist.get_rank() == 0
    with together():
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            (part / "about.json").write_text(json.dumps(about))
    with together():
        write_tensors(part, state)
    with together():
        if first:
            shapes_in(part, state)
            part.rename(folder / f"step-{about['step']:09}")
            for old in sorted(folder.glob("step-*"))[:-2]:
                shutil.rmtree(old)


def about_in(folder, settings):
    """What a checkpoint says of itself; ValueError if it was made with other settings."""
    about = json.loads((folder / "about.json").read_text())
    made_with = about["settings"]
    if any(made_with.get(name) != value for name, value in settings.items()):
        raise ValueError(f"it was made with {made_with}, not with {settings}")
    return about


def load(folder, state, settings):
    """Fill this rank's part of a state from a checkpoint of any ranks; returns its JSON."""
    with together(f"{folder} cannot be used; delete it, or name another folder: "):
        shapes_in(folder)
        about = about_in(folder, settings)
    with together(f"{folder} is of another model; name another folder: "):
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    return about


def to_notebook(folder, sums=False, relu_after_bottom=False):
    """A checkpoint as the notebook's state_dict, or `RowAdagrad`'s sums; needs no process group."""
    about_in(folder, {"relu_after_bottom": relu_after_bottom})
    shapes = {name: size for name, size in shapes_in(folder).items() if ("sums." in name) == sums}
    natural = sorted(shapes, key=lambda name: (len(name), name))  # table 2 before table 10
    state = {name: torch.empty(shapes[name]) for name in natural}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return {name.removeprefix("sums."): value for name, value in state.items()}


def from_notebook(folder, weights, sums=(), relu_after_bottom=False):
    """The way back: makes the folder for `--weights`."""
    write_tensors(folder, weights | {f"sums.{name}": sums[name] for name in sums})
    about = {"settings": {"relu_after_bottom": relu_after_bottom}}
    (folder / "about.json").write_text(json.dumps(about))


# ---- Training ------------------------------------------------------------------------------------


class KeyedBatch(collections.namedtuple("KeyedBatch", ["dense", "indices", "offsets", "labels"])):
    """A `Batch` for `ShardedTables`: `indices` is one object, with lengths; `offsets` is None."""

    def to(self, device):
        moved = {name: getattr(self, name).to(device) for name in ("dense", "indices", "labels")}
        return self._replace(**moved)


def keyed(batch):
    """A `Batch` as TorchRec takes it, with keys t0, t1, ... for its tables."""
    bags = zip(batch.indices, batch.offsets, strict=True)
    lengths = torch.cat([dlrm_utils.offsets_to_lengths(starts, len(ids)) for ids, starts in bags])
    keys = [f"t{t}" for t in range(len(batch.indices))]
    ids = KeyedJaggedTensor(keys=keys, values=torch.cat(batch.indices), lengths=lengths)
    return KeyedBatch(batch.dense, ids, None, batch.labels)


def own_batch(data, numbers):
    """This rank's equal share of rows: neighbours in the file, so that it reads its part of it."""
    return keyed(data.batch(np.sort(numbers).reshape(dist.get_world_size(), -1)[dist.get_rank()]))


def opened(arguments):
    """The processed data; ValueError where this number of processes cannot train on them."""
    data, world = dlrm_utils.load_criteo(arguments.processed), dist.get_world_size()
    if data.labels is None or not (data.table_sizes and data.validation):
        raise ValueError(f"{arguments.processed} lacks a label, categories, or validation rows")
    if arguments.batch_size % world or not 0 < arguments.batch_size <= len(data.train):
        raise ValueError(f"--batch-size must be a multiple of {world}, at most {len(data.train)}")
    if arguments.sharding == "row-wise" and min(data.table_sizes) < world:
        raise ValueError(f"a table has fewer rows than {world} ranks: use --sharding big-row-wise")
    return data


@torch.no_grad()
def evaluate(book, model, data, rows, device):
    """The notebook's scores on a range of rows, of which every rank predicts its share."""
    again = [rows[-1]] * (-len(rows) % dist.get_world_size())  # so that all shares are equal
    batch = own_batch(data, [*rows, *again]).to(device)
    parts = gathered(torch.sigmoid(model(*batch[:3])).cpu().numpy())
    return book.score(data.labels[rows.start : rows.stop], np.concatenate(parts)[: len(rows)])


def resume(path, state, arguments, settings):
    """What a checkpoint says, or a new one of step 0; the state is filled accordingly."""
    if path:
        return load(path, state, settings)
    if arguments.weights:
        weights = {name: state[name] for name in state if "sums." not in name}
        load(arguments.weights, weights, {"relu_after_bottom": arguments.relu_after_bottom})
    about = dict(step=0, history=[], settings=settings)
    save(arguments.checkpoints, state, about)
    return about


def run(book, arguments):
    """Train, evaluate and save; returns each step's log loss and [step, log loss] of validation."""
    device, size = torch.device("cpu"), arguments.batch_size
    say = partial(print, flush=True) if dist.get_rank() == 0 else lambda text: None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with together():
        data, path = opened(arguments), newest(arguments.checkpoints)
    kept = ("batch_size", "epochs", "optimizer", "learning_rate", "relu_after_bottom")
    settings = {name: getattr(arguments, name) for name in kept} | {"data": data.fingerprint()}
    mine = settings | dict(newest=path and path.name)
    others = [one for one in gathered(mine) if one != mine]
    with together():
        if others:
            raise ValueError(f"data, checkpoints or options differ: {mine}, elsewhere {others[0]}")
        sizes = len(data.encoder.numeric), data.table_sizes
        model, optimizer = sharded_model(book, *sizes, arguments, device)
    state = state_of(model, optimizer)
    about = resume(path, state, arguments, settings)
    rows = data.train[: len(data.train) // size * size]  # without an incomplete last batch
    total = arguments.epochs * len(rows) // size
    say(f"starting from step {about['step']:,} of {total:,}")

    def after_step(step, logits, labels):
        done = step + 1
        if done % arguments.every == 0 or done in (total, arguments.stop):
            scores = evaluate(book, model, data, data.validation[:50_000], device)
            about["history"].append([done, scores["log_loss"]])
            save(arguments.checkpoints, state, about | dict(step=done))
            found = f"log loss {scores['log_loss']:.4f}, AUC {scores['auc']:.4f}"
            say(f"step {done:,} of {total:,}: {found}, base rate {scores['base_rate']:.3f}")

    began, plan = time.perf_counter(), (arguments.epochs, 0, about["step"], arguments.stop)
    losses = book.train(model, partial(own_batch, data), rows, optimizer, size, *plan, after_step)
    losses = np.mean(gathered(losses), axis=0).tolist()  # of equal shares: of the whole batch
    speed = len(losses) * size / (time.perf_counter() - began)
    say(f"{len(losses):,} steps, {speed:,.0f} rows/s with evaluations and checkpoints")
    return losses, about["history"]


# ---- Plans for a cluster that is not there -------------------------------------------------------


def compare_plans(gpus, batch_size, width=128):
    """Print what TorchRec expects of each strategy for the Terabyte tables."""
    found, told, sizes, gib = {}, {}, TERABYTE_TABLE_SIZES, 2**30
    stats = SimpleNamespace(log=lambda *_, **given: told.update(given))
    print(f"{gpus:,} GPUs of 80 GiB, eight a machine, {batch_size:,} samples each, by TorchRec:")
    for strategy in STRATEGIES:
        model = torch.nn.Sequential(ShardedTables(sizes, width))
        topology = planner.Topology(gpus, "cuda", 80 * gib, local_world_size=min(8, gpus))
        sharder = Sharder(fused_params=dict(optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD))
        try:
            planner_of(sizes, strategy, topology, batch_size, stats).plan(model, [sharder])
        except planner.types.PlannerError:
            continue
        ms, held = np.zeros(gpus), np.zeros(gpus)
        for shard in sum((option.shards for option in told["best_plan"]), []):
            ms[shard.rank] += shard.perf.total
            held[shard.rank] += 4 * np.prod(shard.size) / gib
        found[strategy] = ms.max(), held.max(), held.min(), (held == 0).sum()
    if not found:
        raise SystemExit(f"It does not fit on {gpus} GPUs, by any strategy")
    index = ["slowest GPU, ms", "fullest, GiB", "emptiest, GiB", "GPUs without a table"]
    print(pd.DataFrame(found, index).T.to_string(float_format="{:,.2f}".format))


# ---- Command line --------------------------------------------------------------------------------


def parsed(command_line):
    """The arguments; where they are wrong, only rank 0 says so, in a line after the usage's."""
    usage = "torchrun --nproc-per-node N dlrm_torchrec.py PROCESSED [options], or -h"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("processed", nargs="?", help="the processed folder, of dlrm_utils.py preprocess")
    add("--checkpoints", default="build/torchrec", type=Path, help="a folder that all ranks share")
    add("--weights", type=Path, help="start from the weights of this checkpoint")
    add("--batch-size", type=int, default=2048, help="samples a step; in a plan, of each GPU")
    add("--optimizer", choices=["row-wise-adagrad", "sgd"], default="row-wise-adagrad")
    add("--learning-rate", type=float, default=0.02)
    add("--sharding", choices=STRATEGIES, default="table-wise")
    add("--epochs", type=int, default=1)
    add("--every", type=int, default=2000, help="steps between evaluations and checkpoints")
    add("--stop", type=int, help="stop after this step")
    add("--width", type=int, default=16, help="of the embeddings")
    add("--bottom", type=int, nargs="+", default=[512, 256, 64], help="widths, hidden layers")
    add("--top", type=int, nargs="+", default=[512, 256])
    add("--relu-after-bottom", action="store_true", help="the published form")
    add("--plan-only", type=int, metavar="GPUS", help="compare plans for the Terabyte tables")
    with contextlib.redirect_stderr(None if int(os.environ.get("RANK", 0)) else sys.stderr):
        arguments = parser.parse_args(command_line)
        for name, value in vars(arguments).items():
            numbers = [n for n in np.atleast_1d(value).tolist() if type(n) in (int, float)]
            if not all(0 < number < np.inf for number in numbers):
                parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if not arguments.plan_only and not (arguments.processed and "RANK" in os.environ):
            parser.error("start this by torchrun and name the processed folder")
    return arguments


def end_on_signals(message):
    """Ctrl-C, or torchrun when a rank is lost, ends this one, though a collective may wait."""
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno())  # Python's own handlers wait until a collective is done
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told)  # which has to live

    def end():
        heard.recv(1)
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def main(command_line=None):
    """What the command line asks for; returns what `run` does."""
    logging.disable(logging.WARNING)  # TorchRec warns of what it does by design
    logging.captureWarnings(True)
    arguments = parsed(command_line)
    if arguments.plan_only:
        return compare_plans(arguments.plan_only, arguments.batch_size)
    lost = f"rank {os.environ['RANK']}: a process is gone or was stopped; the same command goes on"
    end_on_signals(lost)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        book = load_notebook(names=["DLRM", "RowAdagrad", "score", "train"])
        result = run(book, arguments)
    except RuntimeError as error:
        raise SystemExit(lost) if "Connection" in str(error) else error from None
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
