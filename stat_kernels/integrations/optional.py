"""Libraries that an integration needs and the project does not."""

import importlib
from typing import Any


def require(module: str, minimum: str) -> Any:
    """The module, imported.

    Args:
        module: its full name, for example "timm.models.deit".
        minimum: oldest version that was tried, for the message.

    Raises:
        ImportError: its library is not installed, or lacks this module; one sentence.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise  # the library is there and misses something of its own: its message says what
        raise ImportError(
            f"stat_kernels.integrations.{library} needs {library} {minimum} or newer (no module "
            f"named {error.name}): pip install 'stat-kernels[integrations]'"
        ) from error
