"""Make small wheels, for the real pip to download from a folder."""

import hashlib
import zipfile
from pathlib import Path

from fedbpt.machine.wheel_files import Package


def make_wheel(folder: Path, name: str, member: str, content: bytes) -> Package:
    """Write a minimal wheel of ``name`` 1.0 with ``content`` at ``member``."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return Package(name, "1.0", hashlib.sha256(data).hexdigest(), len(data))
