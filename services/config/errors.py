"""The one error of a configuration that can't be used."""


class ConfigError(Exception):
    """A flag, variable or key of a file can't be used; the message names it."""
