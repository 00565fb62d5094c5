"""Run the adapters' tests against the oldest and the newest versions of their frameworks.

    .venv/bin/python scripts/test_frameworks.py                          all of tests/frameworks/*.txt
    .venv/bin/python scripts/test_frameworks.py langchain-oldest -- -x   one, with arguments for pytest

Each file of requirements gets an environment in ``build/frameworks``, which sees everything of the environment that
runs this script and puts the file's versions in front, so that torch is not installed twice.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "tests" / "frameworks"
BUILD = ROOT / "build" / "frameworks"
TESTS = {"langchain": "langchain", "llama-index": "llama_index"}  # framework -> the folders of its tests


def main() -> int:
    """Test every version asked for, say what was tested, and give 1 when one failed."""
    names = sorted(file.stem for file in FILES.glob("*.txt"))
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names)}; all by default")
    asked = parser.parse_args(given[:cut]).names or names
    if unknown := set(asked) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    failed = [name for name in asked if not tested(name, given[cut + 1 :])]
    print(f"{len(asked) - len(failed)} of {len(asked)} passed{'; failed: ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


def tested(name: str, for_pytest: list[str]) -> bool:
    """Run one framework's tests in its environment."""
    python = environment(name)
    framework = next(known for known in TESTS if name.startswith(known))
    tests = [f"tests/{kind}/{TESTS[framework]}" for kind in ("unit", "integration")]
    print(f"== {name}: {', '.join(versions(python, framework))}", flush=True)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *tests, *for_pytest]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0  # noqa: S603 - our own command


def environment(name: str) -> Path:
    """Make an environment, unless it is there and its file has not changed, and give its interpreter."""
    file, folder = FILES / f"{name}.txt", BUILD / name
    mark, wanted = folder / "made-of", hashlib.sha256(file.read_bytes()).hexdigest()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if mark.exists() and mark.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    base = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", "venv", vars=base))
    shared = sysconfig.get_path("purelib")  # behind the environment's own, its .pth files too
    (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "--requirement", str(file)]
    subprocess.run(install, cwd=ROOT, check=True)  # noqa: S603 - our own command
    mark.write_text(wanted)
    return python


def versions(python: Path, framework: str) -> list[str]:
    """Say which versions are seen there of what a framework consists of."""
    code = (
        "import importlib.metadata as m; print(*{f'{d.name} {m.version(d.name)}' for d in m.distributions()}, sep=';')"
    )
    seen = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    family = ("lang",) if framework == "langchain" else ("llama",)
    return sorted(line for line in seen.stdout.strip().split(";") if line.startswith(family))


if __name__ == "__main__":
    sys.exit(main())
