"""What the processes of tests/test_torchrec.py run: one function a job, called on every rank."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import dlrm_models
import dlrm_torchrec as program
import dlrm_utils

BOOK = dlrm_models.load_notebook()  # once: the processes are forks of the one that imported this
CPU = torch.device("cpu")


def start(job, rank, world, port, output, arguments):
    """Be one rank of `world`: what is printed goes to files, {rank} in an argument is filled in."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world)
    program.load_notebook = lambda names: BOOK
    job(*(text.replace("{rank}", str(rank)) for text in arguments))
    sys.stdout.flush()


def train(*arguments):
    """The program itself."""
    losses, history = program.main(arguments)
    print(json.dumps(losses))


def plan(*arguments):
    program.main(arguments)


def train_and_die(moment, step, *arguments):
    """The program, of which one rank is killed while it saves the checkpoint of a step."""
    save, saved = program.save, {}

    def die_at(moment_now, rank):
        dying = saved["step"] == int(step) and moment_now == moment
        if dying and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_noting(folder, state, about):
        saved.update(step=about["step"])
        save(folder, state, about)

    def wrapped(function, before=None, after=None, rank=0):
        def call(*arguments):
            die_at(before, rank)
            result = function(*arguments)
            die_at(after, rank)
            return result

        return call

    program.save = save_noting
    program.write_tensors = wrapped(program.write_tensors, before="unwritten", rank=1)
    program.shapes_in = wrapped(program.shapes_in, before="written")
    Path.rename = wrapped(Path.rename, after="renamed")
    program.main(arguments)


def pass_on(source, target, *arguments):
    """Read a checkpoint into ranks that share the tables in their own way, and write it again."""
    arguments = program.parsed(arguments)
    dist.init_process_group("gloo")
    data = dlrm_utils.load_criteo(arguments.processed)
    sizes = len(data.encoder.numeric), data.table_sizes
    model, optimizer = program.sharded_model(BOOK, *sizes, arguments, CPU)
    state, form = program.state_of(model, optimizer), {"relu_after_bottom": False}
    about = program.load(Path(source), state, form)
    program.save(Path(target), state, about | dict(step=7))


def refusals(*command_lines):
    """What each of several wrong uses ends with, as a line of JSON; no rank may be left waiting."""
    dist.init_process_group("gloo")
    for command_line in command_lines:
        try:
            program.run(BOOK, program.parsed(json.loads(command_line)))
            print("end:", json.dumps("no complaint"))
        except SystemExit as end:
            print("end:", json.dumps(end.code))
        dist.barrier()
