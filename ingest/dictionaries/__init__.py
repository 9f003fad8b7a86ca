"""Dictionaries: imported from other libraries, and run over activations."""

from actstore.dictionary import Dictionary, DictionaryData, DictionarySpec, make_dictionary

from .encoder import Encoder
from .fits import check_fits
from .importing import ImportDictionaryReport, import_dictionary
from .save import save_dictionary

__all__ = [
    "Dictionary",
    "DictionaryData",
    "DictionarySpec",
    "Encoder",
    "ImportDictionaryReport",
    "check_fits",
    "import_dictionary",
    "make_dictionary",
    "save_dictionary",
]
