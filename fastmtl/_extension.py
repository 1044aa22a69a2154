"""Loads the compiled extension, or says once why it is not there and what to do."""

import importlib
import os
import warnings
from types import ModuleType

CURE = (
    "reinstall fastmtl from source with a C++17 compiler: pip install --no-build-isolation . "
    "(`python -m fastmtl info` tells more)"
)


def load() -> tuple[ModuleType | None, str]:
    """Import ``fastmtl._C``.

    Returns:
        The module and an empty text, or None and the reason.

    Raises:
        ImportError: It could not be loaded and ``FASTMTL_REQUIRE_EXT=1``.
    """
    try:
        return importlib.import_module("fastmtl._C"), ""
    except ImportError as error:
        reason = str(error)
    if os.environ.get("FASTMTL_REQUIRE_EXT") == "1":
        raise ImportError(f"fastmtl's compiled extension is required but missing: {reason}. Cure: {CURE}")
    warnings.warn(
        f"fastmtl runs on its slow pure-PyTorch reference: the compiled extension is missing ({reason}). Cure: {CURE}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None, reason


module, missing_because = load()
has_cuda: bool = module is not None and module.build_info()["cuda"]


def kernels_on(device_type: str) -> bool:
    """Whether fastmtl's own kernels serve this device type (``"cpu"``, ``"cuda"``)."""
    return module is not None and (device_type == "cpu" or (device_type == "cuda" and has_cuda))
