"""What MkDocs does besides: the examples are copied to the site, so that links to them hold there, too."""  # noqa: INP001

import shutil
from pathlib import Path
from typing import Any


def on_post_build(config: Any) -> None:
    """Copy the examples. From ``docs/hpc.md`` and from the site's ``hpc/`` alike, they are at ``../examples``."""
    examples, site = Path(config.config_file_path).parent / "examples", Path(config.site_dir) / "examples"
    shutil.copytree(examples, site, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.pt*"))
