"""Small packages for uv to install without an index, and one whose build takes as long as wanted."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

TESTS = Path(__file__).parent.parent


def write_wheel(directory: Path | str, name: str) -> str:
    """Write the wheel of a package NAME, with a program of that name; return the file's name."""
    info = f"{name}-1.dist-info"
    files = {
        f"{name}.py": f"def main():\n    print({name!r})\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    filename = f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(Path(directory) / filename, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return filename


class SlowPackage:
    """The source of a package whose build, begun by uv under its locks, lasts until :meth:`finish`."""

    name = "slowpackage"

    def __init__(self, directory: Path, scratch: Path) -> None:
        """Write the source into DIRECTORY; SCRATCH is for what it waits for."""
        self.source = directory / self.name
        self.source.mkdir()
        self._building = scratch / "building"
        gate = scratch / "gate"
        os.mkfifo(gate)
        # A reader of the FIFO sees its end when this, the only writer, is closed: also by our death.
        self._gate = os.open(gate, os.O_RDWR | os.O_CLOEXEC)
        (self.source / "pyproject.toml").write_text(
            f'[project]\nname = "{self.name}"\nversion = "1"\nscripts = {{ {self.name} = "{self.name}:main" }}\n'
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        (self.source / "backend.py").write_text(
            f"import pathlib, sys\n"
            f"sys.path.insert(0, {str(TESTS)!r})\n"
            f"from support.uvpackages import write_wheel\n"
            f"def build_wheel(directory, *settings):\n"
            f"    pathlib.Path({str(self._building)!r}).touch()\n"
            f"    pathlib.Path({str(gate)!r}).read_bytes()\n"
            f"    return write_wheel(directory, {self.name!r})\n"
        )

    def is_building(self) -> bool:
        """Whether the build has begun."""
        return self._building.exists()

    def finish(self) -> None:
        """Let the build end."""
        os.close(self._gate)
