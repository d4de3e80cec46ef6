"""An importable `torchvision` with nothing in it: SGLang imports it on start, text models never call it."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

__version__ = "0.28.0"


class InterpolationMode(enum.Enum):
    """Used as default arguments by image processors, so it has to exist."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Submodule(ModuleType):
    """Any `torchvision.x.y`: every name can be imported and raises when it is called."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type[InterpolationMode] | Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return InterpolationMode

        def call(*_args: object, **_kwargs: object) -> NoReturn:
            raise NotImplementedError(f"{self.__name__}.{name} has no CPU stand-in")

        return call


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Submodule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(_Finder())
