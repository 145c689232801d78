"""Peak memory of ``run_recommend`` by the number of users."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from benchmarks.serving.contenders import ROOT, save, served

ITEMS, K = 3416, 20
SHORTEST, LONGEST = 5, 15
USERS_AT_A_TIME = 100_000
CHILD = """
import json, time
from benchmarks.measure import resident
from recbole_ssm.cli import run_recommend
begin = time.perf_counter()
status = run_recommend.main()
print(json.dumps({"seconds": time.perf_counter() - begin, "peak": resident("VmHWM")}))
raise SystemExit(status)
"""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row a number of users."""
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, source, output = folder / "model.pth", folder / "in.parquet", folder / "out.parquet"
        save(served("Mamba4Rec", ITEMS), checkpoint)
        for users in arguments.memory_users:
            interactions = _write(source, users)
            words = ["--checkpoint", checkpoint, "--input", source, "--output", output, "-k", K, "--device", "cpu"]
            found[users] = _run([str(word) for word in words])
            if (written := pa.parquet.read_metadata(output).num_rows) != users * K:
                raise RuntimeError(f"run_recommend wrote {written} rows for {users} users")
            seconds, megabytes = found[users]["seconds"], found[users]["peak"] / 1e6
            print(f"memory, {users} users: {megabytes:.0f} MB, {users / seconds:,.0f} users/s", flush=True)
            rows.append(
                {
                    "users": f"{users:,}",
                    "interactions": f"{interactions:,}",
                    "peak, MB": f"{megabytes:.0f}",
                    "seconds": f"{seconds:.3g}",
                    "users a second": f"{users / seconds:,.0f}",
                }
            )
    return {
        "title": "Memory of run_recommend",
        "settings": f"Mamba4Rec, hidden_size 64, {ITEMS:,} items, {K} a user, float32, untrained; generated histories "
        f"of {SHORTEST} to {LONGEST} events, a user's rows apart",
        "rows": rows,
        "found": found,
        "protocol": {
            "peak": "the largest resident set of the process (VmHWM), Python, torch and the model included",
            "seconds": "of the command, from a file of Parquet to one, once; loading the model and what is compiled at "
            "a process's first use of it are in them, imports are not",
        },
    }


def _run(words: Sequence[str]) -> dict[str, float]:
    """Seconds and peak bytes of ``run_recommend`` in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CHILD, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"run_recommend failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _write(path: Path, users: int) -> int:
    """Histories, a block of users after the other, their rows shuffled; the number of rows."""
    generator, count = np.random.default_rng(0), 0
    schema = pa.schema([(name, pa.int64()) for name in ("user_id", "item_id", "timestamp")])
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for begin in range(0, users, USERS_AT_A_TIME):
            block = np.arange(begin, min(users, begin + USERS_AT_A_TIME))
            user = np.repeat(block, generator.integers(SHORTEST, LONGEST, len(block), endpoint=True))
            item, when = (
                generator.integers(1, ITEMS, len(user), endpoint=True),
                generator.integers(1 << 30, size=len(user)),
            )
            generator.shuffle(user)
            writer.write_table(pa.table([user, item, when], schema=schema))
            count += len(user)
    return count
