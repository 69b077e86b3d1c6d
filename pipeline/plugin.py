"""Importing this module teaches transformers the packed format; every model card prints its name."""

from pipeline.package import hf_plugin as hf_plugin
