"""MeLFusion as a diffusers pipeline: a picture and a sentence go in, music comes out (arXiv 2406.04673)."""

from .inversion_melfusion import ImageFeatures
from .modeling_melfusion import VisualSynapse
from .pipeline_melfusion import MelFusionPipeline

__all__ = ["ImageFeatures", "MelFusionPipeline", "VisualSynapse"]
__version__ = "0.1.0.dev0"
