"""What pyproject.toml cannot say: an installed package carries data and notebooks inside.

They lie beside the code in the repository, and an editable install uses them there.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = ("data", "notebooks")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.tmp", "*.failed.ipynb")


class BuildWithFiles(build_py):
    """Build the package, then copy the folders it carries."""

    def run(self) -> None:
        """Copy them into `frugalvlm/_files`, where `frugalvlm.paths` looks for them."""
        super().run()
        if self.editable_mode:
            return
        for name in CARRIED:
            target = Path(self.build_lib) / "frugalvlm" / "_files" / name
            shutil.rmtree(target, ignore_errors=True)  # an earlier build may have held other files
            shutil.copytree(name, target, ignore=LEFT_OUT)


setup(cmdclass={"build_py": BuildWithFiles})
