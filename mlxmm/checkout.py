"""In a checkout, `callbacks` and `recipes` are second names of `mlxmm.callbacks` and `mlxmm.recipes`.

Without this, Python would load `callbacks.timer` and `mlxmm.callbacks.timer` as two modules. Every class would then
exist twice, and an object of one would be no instance of the other.
"""

import sys
from importlib import import_module
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader


class SecondName(MetaPathFinder, Loader):
    """Finds `package.x` as `mlxmm.package.x`: one module under two names."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if not name.startswith(f"{self.package}.") or (real := find_spec(f"mlxmm.{name}")) is None:
            return None
        is_package = real.submodule_search_locations is not None
        return spec_from_loader(name, self, origin=real.origin, is_package=is_package)

    def create_module(self, spec: ModuleSpec):
        module = import_module(f"mlxmm.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module) -> None:
        """Put back the module's own spec: Python has just replaced it by the one of its second name."""
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str):
        """The code of a module for `python -m`, which runs it as `__main__`."""
        spec = find_spec(f"mlxmm.{name}")
        assert spec is not None and isinstance(spec.loader, InspectLoader)
        return spec.loader.get_code(spec.name)


def share_modules(package: str) -> None:
    """Make `package` share its modules with `mlxmm.package`."""
    if not any(isinstance(finder, SecondName) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, SecondName(package))
