"""Where a pretrained model lies: a folder, or an installed package that ships one; nothing is imported or executed."""

import importlib.machinery
import sys
from pathlib import Path

from elmo_stream.errors import UserError

_DEPTH = 3


def find_pretrained(name: str, wanted: str) -> Path | None:
    """Folder that holds the file ``wanted`` (``config.json``, ``tokenizer.json``) for a folder or package name.

    A package is looked up on ``sys.path`` without importing it, since importing runs its code. None when the name is
    neither, and may then be a name on the Hugging Face hub.

    Raises:
        UserError: the package ships several such folders.
    """
    if Path(name).is_dir():
        return Path(name) if (Path(name) / wanted).is_file() else None
    module = name.replace("-", "_")
    if not module.isidentifier():
        return None
    spec = importlib.machinery.PathFinder.find_spec(module, sys.path)
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    for depth in range(_DEPTH):
        folders = [path.parent for root in roots for path in sorted(root.glob("*/" * depth + wanted))]
        if len(folders) > 1:
            listed = ", ".join(map(str, folders))
            raise UserError(
                f"{name}: the package ships several tokenizers or models; give one of the folders {listed}."
            )
        if folders:
            return folders[0]
    return None
