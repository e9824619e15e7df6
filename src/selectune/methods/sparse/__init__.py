"""Which single weights train, changing while they do: one file per method.

Importing this package registers every file in it.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
