"""No function of this module is needed: see the package."""

from . import missing as __getattr__  # noqa: F401 - Python requests this for each name that is imported from here
