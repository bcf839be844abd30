"""Ten kills (signal 9) at random moments of one training, each resumed; the final weights against those of a run left alone."""
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_long_run import killed_runs, preprocess_criteo, run, same_bits, write_toy_criteo


def main(kills=10):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_toy_criteo(folder / "toy.txt", 300_000)
        preprocess_criteo(folder / "toy.txt", folder / "toy.npz", min_count=10)
        run(folder / "toy.npz", folder / "whole")
        before_the_end = killed_runs(folder / "toy.npz", folder / "killed", kills, seed=1)
        equal = all(same_bits(folder / "whole" / name, folder / "killed" / name) for name in ("last.pt", "best.pt"))
    print(f"{kills} kills, {before_the_end} before the end: final and best checkpoints equal, bit for bit: {equal}")


if __name__ == "__main__":
    main()
