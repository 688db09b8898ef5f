"""Collect what a GPU machine without network lacks: packages, and a `setup.sh` that lays them over its own.

    python benchmarks/offline_kit.py --python 3.12 --platform manylinux_2_28_x86_64 --output kit
    # copy the kit and a clone to the machine; there, in the clone, with the image's own python3:
    bash ../kit/setup.sh && .venv/bin/finetune doctor ...

The image brings torch and what belongs to it (`--image`); the wheels of all else that requirements.txt needs for the
given Python are downloaded, with what they require in turn, and unpacked into one archive. Nothing of the image is
changed: `.venv` sees its packages behind ours.
"""

from __future__ import annotations

import argparse
import email
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
IMAGE = "torch triton numpy pandas pyarrow pillow sympy mpmath networkx setuptools scipy"
LEFT_OUT = {"gguf", "hf-xet"}  # of the quickstart, and of downloads
GLIBC = (28, 27, 24, 17, 12, 5)  # minor versions that wheels are built for
OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
SETUP = """\
#!/usr/bin/env bash
# Make .venv in the clone that this is called in, from the wheels beside this file and the packages of `python3`.
set -euo pipefail
kit=$(cd "$(dirname "$0")" && pwd)
[ -f finetune/finetune.py ] || { echo "error: call this in a clone of the project" >&2; exit 2; }
[ "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "@PYTHON@" ] ||
  { echo "error: the wheels are for Python @PYTHON@, python3 is $(python3 --version)" >&2; exit 2; }
python3 -c 'import torch' || { echo "error: python3 has no torch: the kit lies over an image that has it" >&2; exit 2; }
image=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
torch=$(python3 -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
python3 -m venv --without-pip .venv
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python3 -m tarfile -e "$kit/packages.tar.xz" "$kit/packages"
cp -r "$kit"/packages/site/. "$site/" && cp -r "$kit"/packages/bin/. .venv/bin/
printf '#!python\\nfrom finetune.__main__ import main\\nmain()\\n' > .venv/bin/finetune
sed -i "1s|^#!.*python.*|#!$PWD/.venv/bin/python|" $(grep -lIm1 '^#!.*python' .venv/bin/*)
chmod +x .venv/bin/*
printf '%s\\n' "$PWD" "$torch" "$image" > "$site/offline_kit.pth"
mkdir -p .models && cp -rn "$kit"/packages/models/. .models/
.venv/bin/python -c 'import deepspeed, torch, transformers; print("torch", torch.__version__, "transformers",
  transformers.__version__, "deepspeed", deepspeed.__version__, "GPUs", torch.cuda.device_count())'
echo "Done. To test it: HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -m gpu"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="version of the image's Python")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64", help="newest platform tag that the image takes")
    parser.add_argument("--output", type=Path, default=Path("offline_kit"))
    parser.add_argument("--wheels", type=Path, help="where downloads are kept (default: build/wheels-PYTHON)")
    parser.add_argument("--image", nargs="*", default=IMAGE.split(), help="packages that the image has")
    parser.add_argument("--also", nargs="*", default=["hypothesis", "liger-kernel", "pytest"], help="further packages")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    wheels = given.wheels or ROOT / "build" / f"wheels-{given.python}"
    wheels.mkdir(parents=True, exist_ok=True)
    names = collect(wheels, given.python, given.platform, set(map(canonicalize_name, given.image)), given.also)
    with tempfile.TemporaryDirectory() as name:
        packages = Path(name)
        for wheel in names:
            unpack(wheel, packages)
        target = packages / "models" / MODEL.name  # tokenizer and configs, for the tests
        target.mkdir(parents=True)
        for path in MODEL.glob("*.json*") if MODEL.is_dir() else ():
            shutil.copy(path, target)
        archive = given.output / "packages.tar.xz"
        with tarfile.open(archive, "w:xz", preset=2) as file:
            file.add(packages, ".")
    (given.output / "setup.sh").write_text(SETUP.replace("@PYTHON@", given.python), encoding="utf-8")
    print(f"{archive}: {len(names)} packages, {archive.stat().st_size / 1e6:.1f} MB")


def collect(wheels: Path, python: str, platform: str, image: set[str], also: list[str]) -> list[Path]:
    """Return the wheels of requirements.txt and of all that they require, but what the image has."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        canonicalize_name(requirement.name): requirement
        for requirement in (Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip())
    }
    wanted = [*pinned.values(), *map(Requirement, also)]
    done, collected = image | LEFT_OUT, []
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name in done:
            continue
        done.add(name)
        wheel = download(pinned.get(name, requirement), wheels, python, platform)
        print(f"{wheel.stat().st_size / 1e6:6.1f} MB  {wheel.name}", flush=True)
        wanted += requirements_of(wheel, python, requirement.extras)
        collected.append(wheel)
    return collected


def unpack(wheel: Path, packages: Path) -> None:
    """Unpack a wheel: its modules into `site`, its scripts into `bin`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in [name for name in archive.namelist() if not name.endswith("/")]:
            top, *rest = Path(name).parts
            target = packages / "site" / name
            if top.endswith(".data"):
                kind = {"scripts": "bin", "purelib": "site", "platlib": "site"}.get(rest[0], rest[0])
                target = packages.joinpath(kind, *rest[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


def download(requirement: Requirement, wheels: Path, python: str, platform: str) -> Path:
    """Download a wheel for the image, or build it where there is only a source that needs no compiler."""
    pip, name = [sys.executable, "-m", "pip", "--quiet"], f"{requirement.name}{requirement.specifier}"
    for path in wheels.glob("*.whl"):
        project, version, *_ = parse_wheel_filename(path.name)
        if project == canonicalize_name(requirement.name) and version in requirement.specifier:
            return path
    target = Path(tempfile.mkdtemp(dir=wheels))
    abi = f"cp{python.replace('.', '')}"
    tags = [word for tag in platform_tags(platform) for word in ("--platform", tag)]
    found = subprocess.run(
        [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", target, "--python-version", python,
         "--implementation", "cp", "--abi", abi, "--abi", "abi3", "--abi", "none", *tags, name],
        capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        built = subprocess.run(
            [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, name],
            capture_output=True,
            text=True,
        )
        if built.returncode:
            sys.exit(f"error: {name}: {found.stderr.strip()}\n{built.stderr.strip()}")
    (built_or_found,) = target.iterdir()
    wheel = built_or_found.replace(wheels / built_or_found.name)
    target.rmdir()
    if found.returncode and not wheel.name.endswith("-none-any.whl"):
        sys.exit(f"error: {wheel.name}: {name} has no wheel for {platform}, and its build is for this machine alone")
    return wheel


def platform_tags(platform: str) -> list[str]:
    """Return a platform tag and the older ones that the same machine takes, newest first."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
    if match is None:
        return [platform]
    newest, machine = int(match[1]), match[2]
    minors = dict.fromkeys(minor for minor in (newest, *GLIBC) if minor <= newest)
    tags = [f"manylinux_2_{minor}_{machine}" for minor in minors]
    return tags + [f"{old}_{machine}" for minor, old in OLD_NAMES.items() if minor <= newest] + [f"linux_{machine}"]


def requirements_of(wheel: Path, python: str, extras: set[str]) -> list[Requirement]:
    """Return what a wheel requires on the image."""
    project, version, *_ = parse_wheel_filename(wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = email.message_from_bytes(archive.read(name))
    target = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "os_name": "posix",
        "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }  # fmt: skip
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate({**target, "extra": extra}) for extra in (extras or {""}))
    ]


if __name__ == "__main__":
    main()
