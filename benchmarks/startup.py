"""How long the `deepspeed` command takes to its first step: this project against a stock script, both warm.

    python benchmarks/startup.py --repeats 3

Both train LoRA adapters on the small model under ZeRO-2 on one rank; the stock script tokenizes in a plain loop. Taking
turns, each is run once more beforehand, for the file cache and what DeepSpeed compiles.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from environments import HERE, PRETRAINED, ROOT, machine

SCRIPTS = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first step, against a stock script.")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(f"{machine()}, {time.strftime('%Y-%m-%d %H:%M')}")
    seconds: dict[str, list[float]] = {"stock script": [], "this project": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(-1, given.repeats):
            for name, taken in seconds.items():
                found, said = _seconds_to_first_step(name, Path(folder) / f"{name} {repeat}")
                if repeat >= 0:
                    taken.append(found)
                    print(f"{name}: {found:.2f} s   {said}", flush=True)
    stock, ours = (median(seconds[name]) for name in ("stock script", "this project"))
    print(f"this project {ours:.2f} s, stock script {stock:.2f} s: {ours / stock:.2f}")


def _seconds_to_first_step(name: str, output: Path) -> tuple[float, str]:
    """Seconds from the command to what is printed right before the first step, and that line."""
    model, data = str(PRETRAINED), str(ROOT / "data" / "identity.json")
    if name == "stock script":
        script, marker = [str(HERE / "peers" / "start_stock.py"), model, data, str(output)], "first step"
    else:
        named = ["--model_name_or_path", model, "--data_path", data, "--output_dir", str(output)]
        flags = "--deepspeed zero2 --use_lora True --max_steps 1 --save_strategy no".split()
        script, marker = [str(ROOT / "finetune" / "finetune.py"), *named, *flags], "Plan"
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    began = time.time()
    process = subprocess.Popen(
        [str(SCRIPTS / "deepspeed"), "--num_gpus", "1", *script],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    found = None
    for line in process.stdout or ():
        if line.strip().endswith(marker) and found is None:
            found = (time.time() - began, line.strip())
    if process.wait() or found is None:
        sys.exit(f"{name} ended with status {process.returncode} before its first step")
    return found


if __name__ == "__main__":
    main()
