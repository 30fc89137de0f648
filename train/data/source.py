"""From what the config says under `data` to a data set: a name that dlops knows, a folder, or an archive."""

from __future__ import annotations

from pathlib import Path

from dlops import catalog
from dlops.errors import unknown_name
from dlops.train.data.dataset import DataSet
from dlops.train.data.folder import load_folder


def open_data(data: str, *, split_seed: int) -> DataSet:
    """The data set. A catalog name wins over a folder of that name: `./digits` means the folder.

    Raises UsageError for what is neither, and what the data set's reader raises.
    """
    if data in catalog.DATASETS:
        loaded: DataSet = catalog.resolve(catalog.DATASETS, "data set", data)(split_seed=split_seed)
        return loaded
    path = Path(data).expanduser()
    if not path.exists():
        error = unknown_name("data set", data, catalog.DATASETS)
        raise type(error)(f"{error.message}, and no folder or archive of that name", hint=error.hint)
    return load_folder(path, split_seed=split_seed)
