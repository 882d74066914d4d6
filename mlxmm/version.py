"""The version of this package: of a clone that of its setup.cfg, else the one that was installed."""

from pathlib import Path


def installed_version() -> str:
    """For example "0.1.0"."""
    import configparser  # both take 40 ms: only when asked
    from importlib import metadata

    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")  # only in a clone; nothing is read where it is missing
    if settings.get("metadata", "name", fallback=None) == "mlxmm":
        return settings["metadata"]["version"]
    return metadata.version("mlxmm")
