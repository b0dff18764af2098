"""Nothing of it is there: see the package."""

from . import missing as __getattr__  # noqa: F401 - asked by Python for each name that is imported from here
