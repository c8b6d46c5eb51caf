"""MeLFusion as a diffusers pipeline: a picture and a sentence go in, music comes out (arXiv 2406.04673).

| module | what it holds |
|---|---|
| `melfusion_pipeline.pipeline_melfusion` | `MelFusionPipeline`: the call and its stages |
| `melfusion_pipeline.checkpoint_melfusion` | composing, loading and saving pipelines |
| `melfusion_pipeline.sources_melfusion` | where a checkpoint lies, and getting what is needed of it |
| `melfusion_pipeline.modeling_melfusion` | `VisualSynapse`: what is learned |
| `melfusion_pipeline.pictures_melfusion` | whatever a user calls a picture, prepared for the image VAE |
| `melfusion_pipeline.features_melfusion` | `ImageFeatures`: what a picture contributes to the music |
| `melfusion_pipeline.inversion_melfusion` | DDIM inversion of a picture, recording its features |
| `melfusion_pipeline.encoding_melfusion` | the pipeline's methods on the picture's side |
| `melfusion_pipeline.windows_melfusion` | the time axis: windows over a long piece, and which picture each sees |
| `melfusion_pipeline.waveforms_melfusion` | from a waveform to its log-mel spectrogram: rate, level, bands |
| `melfusion_pipeline.given_audio_melfusion` | music that is already there: stretches made anew, and their joins |
| `melfusion_pipeline.decoding_melfusion` | between latents and waveforms, window by window |
| `melfusion_pipeline.prompts_melfusion` | how a prompt becomes arguments of the music UNet |
| `melfusion_pipeline.families_melfusion` | the same for AudioLDM 2 and for UNets with one text sequence |
| `melfusion_pipeline.guidance_melfusion` | the guidance branches and how they are combined |
| `melfusion_pipeline.denoising_melfusion` | one step: the music UNet on every window, in every branch |
| `melfusion_pipeline.adapters_melfusion` | LoRA adapters of the music UNet |
| `melfusion_pipeline.checks_melfusion` | refusing what a call cannot do |
| `melfusion_pipeline.arguments_melfusion` | refusing single arguments: numbers, paths |
| `melfusion_pipeline.blending` | `blend_image`: the synapse as a plug for other pipelines |
| `melfusion_pipeline.attention_melfusion` | the attention processors that record and blend keys and values |
| `melfusion_pipeline.vocoder_melfusion` | `MusicVocoder`: the small checkpoint's vocoder |
| `melfusion_pipeline.files_melfusion` | writing a file whole or not at all |
| `melfusion_pipeline.locks_melfusion` | threads that share components |
| `melfusion_pipeline.audio` | sound files, and the way from a waveform to music latents |
| `melfusion_pipeline.tables` | sets of triplets as files: JSON lines, CSV |
| `melfusion_pipeline.sets` | sets of triplets as `datasets` has them |
| `melfusion_pipeline.data` | triplets: reading, checking, publishing |
| `melfusion_pipeline.streams` | triplets read while training |
| `melfusion_pipeline.training` | the training objective |
| `melfusion_pipeline.caches` | what never changes in training, computed once |
| `melfusion_pipeline.metrics` | figures of generated music, as pure functions |
| `melfusion_pipeline.extractors` | the embeddings that the figures are computed from |
| `melfusion_pipeline.plotting` | figures to look at |
| `melfusion_pipeline.film` | films: pictures out of them, and their shots |
| `melfusion_pipeline.onsets` | where notes begin, and how the cuts of a film meet them |
| `melfusion_pipeline.scoring` | slide shows and films with music, as one file |
"""

from .blending import blend_image
from .features_melfusion import ImageFeatures
from .modeling_melfusion import VisualSynapse
from .pipeline_melfusion import MelFusionPipeline
from .vocoder_melfusion import MusicVocoder

__all__ = ["ImageFeatures", "MelFusionPipeline", "MusicVocoder", "VisualSynapse", "blend_image"]
__version__ = "0.1.0.dev0"
