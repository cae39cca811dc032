"""The model catalogue and store: locate, fetch, verify.

>>> from fedbpt import models
>>> path = models.pull("smollm2-135m")
>>> models.fingerprint(path)[:7]
'sha256:'
"""

from fedbpt.models.catalogue import CATALOGUE, CatalogueEntry, HubFile, PackagedFile
from fedbpt.models.store import ModelEntry, fingerprint, list_models, locate, pull

__all__ = [
    "CATALOGUE",
    "CatalogueEntry",
    "HubFile",
    "ModelEntry",
    "PackagedFile",
    "fingerprint",
    "list_models",
    "locate",
    "pull",
]
