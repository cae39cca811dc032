"""Model files: catalogue, local store, fingerprints and weight formats.

>>> from fedbpt import models
>>> path = models.pull("smollm2-135m")
>>> models.fingerprint(path)[:7]
'sha256:'
"""

from fedbpt.models.catalogue import CATALOGUE, CatalogueEntry, HubFile, PackagedFile
from fedbpt.models.fingerprints import fingerprint
from fedbpt.models.formats import (
    FORMATS,
    Requantized,
    WeightFormat,
    faster_format,
    matmul_flops,
    requantize,
    tensor_shapes,
    weight_formats,
)
from fedbpt.models.parts import model_parts, model_size
from fedbpt.models.store import ModelEntry, list_models, locate, pull, remove
from fedbpt.models.watch import WatchedFiles

__all__ = [
    "CATALOGUE",
    "FORMATS",
    "CatalogueEntry",
    "HubFile",
    "ModelEntry",
    "PackagedFile",
    "Requantized",
    "WatchedFiles",
    "WeightFormat",
    "faster_format",
    "fingerprint",
    "list_models",
    "locate",
    "matmul_flops",
    "model_parts",
    "model_size",
    "pull",
    "remove",
    "requantize",
    "tensor_shapes",
    "weight_formats",
]
