"""A saved model with as many names as Criteo's Kaggle file: made, and opened in a new process.

python tests/benchmarks/many_names.py [SHARE]   of its 33.8 million names; all: 5 GB, 8 of memory
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import dlrm_models  # noqa: E402
from data.criteo import CATEGORIES, CRITEO_KAGGLE_TABLE_SIZES, INTEGERS  # noqa: E402
from data.toy_clicks import FOUR_HEX_DIGITS  # noqa: E402
from dlrm_utils import FrameEncoder  # noqa: E402

SETTINGS = {"embedding_dim": 16, "bottom_mlp": [64], "top_mlp": [64], "num_dense": len(INTEGERS)}
OPEN = """import pathlib, re, sys, time
import dlrm_models

def report(step):
    [kilobytes] = re.findall(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())
    print(f"{step}: {time.process_time():.1f} s of processor time, {int(kilobytes) / 1e6:.2f} GB")

report("imports")
model, encoder = dlrm_models.load_model(sys.argv[1])
report("load_model")
batch = encoder.transform([sys.argv[2]])
print(float(model(*batch[:3]).detach()))
report("the first line")
"""


def encoder_of(sizes):
    """An encoder of Criteo's columns whose tables have so many rows, all names of 8 hex digits."""
    encoder = FrameEncoder(counts=INTEGERS, categorical=CATEGORIES, label="label")
    names = {}
    for column, size in zip(CATEGORIES, sizes):
        numbers = np.arange(size - 1)
        halves = [FOUR_HEX_DIGITS.gather(half) for half in (numbers >> 16, numbers & 0xFFFF)]
        names[column] = halves[0] + halves[1]
    return encoder.set_fitted(dict.fromkeys(CATEGORIES, "text"), [], names)


def main(share=1.0):
    sizes = [max(2, int(float(share) * size)) for size in CRITEO_KAGGLE_TABLE_SIZES]
    encoder = encoder_of(sizes)
    model = dlrm_models.load_notebook(names=["DLRM"]).DLRM(sizes, **SETTINGS)
    names = [encoder.names(column)[-1] for column in CATEGORIES]
    line = "\t".join(["1", *map(str, range(13)), *names])
    with torch.inference_mode():
        expected = float(model(*encoder.transform([line])[:3]))
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        started = time.perf_counter()
        dlrm_models.save_model(folder, {"class": "DLRM"} | SETTINGS, model, encoder)
        print(f"{sum(sizes):,} rows of tables: saved in {time.perf_counter() - started:.1f} s")
        del model, encoder
        opened = subprocess.run(
            [sys.executable, "-c", OPEN, folder, line], cwd=ROOT, capture_output=True, text=True
        )
    print(opened.stdout + opened.stderr[-2000:], end="")
    print("the same logit:", any(line == str(expected) for line in opened.stdout.splitlines()))


if __name__ == "__main__":
    main(*sys.argv[1:])
