"""The home that attacks are made on."""

from hostile.home import home

__all__ = ["home"]
