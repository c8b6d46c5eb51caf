"""Embeddings and class probabilities of clips, pictures and texts, for the metrics.

Every extractor has the same two methods, so that any other object with these two can take its place:

    embed(audio=..., sampling_rate=...), embed(images=...) or embed(text=...) -> [N, D]
    probabilities(audio=..., sampling_rate=...) -> [N, classes], where text=captions makes the captions the classes

Audio is `[N, T]`, mono float in [-1, 1], at any rate, at least a second; pictures are PIL images; texts are strings.
What has no classes has only `embed`. Nothing is random, and no result depends on the others in the call.

Weights are read from safetensors only. PANNs, PaSST and VGGish are published as pickles: convert a checkpoint once by
saving the state dict of `torch.load(path, weights_only=True)` with `safetensors.torch.save_file`.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_model
from scipy.signal import resample_poly
from scipy.special import softmax
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapModel,
    ClapProcessor,
    CLIPModel,
    CLIPProcessor,
)
from transformers.audio_utils import mel_filter_bank
from transformers.utils import logging


class ClapExtractor:
    """CLAP (Wu et al., arXiv 2211.06687): audio and texts in one space, for the CLAP score, IMSM and FAD.

    Clips longer than the checkpoint's window (10 s) are cropped to their middle, where transformers would crop at
    random; for fusion checkpoints no clip is marked as longer, where transformers would mark a random one.

    Args:
        model: A `ClapModel`.
        processor: Its `ClapProcessor`, which sets the sample rate and the window.
        batch_size: Number of clips or texts a forward pass.
    """

    def __init__(self, model: ClapModel, processor: ClapProcessor, batch_size: int = 8):
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, device="cpu", dtype=torch.float32, batch_size=8):
        """Load from a Hub id such as `laion/clap-htsat-unfused`, or from a folder that model and processor saved.

        Args:
            pretrained_model_name_or_path: The id or the folder.
            device: Where the model runs.
            dtype: The dtype of its weights.
            batch_size: Number of items a forward pass.

        Raises:
            OSError: If there is no such model.
            ValueError: If it is a model of another kind, or lacks weights.
        """
        model = _load_model(ClapModel, pretrained_model_name_or_path, dtype)
        return cls(model.to(device), ClapProcessor.from_pretrained(pretrained_model_name_or_path), batch_size)

    def embed(
        self, *, audio: np.ndarray | None = None, text: Sequence[str] | None = None, sampling_rate: int | None = None
    ) -> np.ndarray:
        """Embed clips or texts.

        Args:
            audio: `[N, T]`.
            text: N strings.
            sampling_rate: The sampling rate of `audio`, in Hz.

        Returns:
            `[N, D]`, rows of unit length.

        Raises:
            ValueError: If not exactly one of both is given, or it is empty, NaN, silent, too short or not mono.
            TypeError: If a text is no string.
        """
        if (audio is None) == (text is None):
            raise ValueError("Give either `audio` or `text`.")
        if audio is None:
            return _in_batches(self._embed_text, _check_text(text), self.batch_size, "CLAP text")
        clips = _check_audio(audio, sampling_rate)
        return _in_batches(lambda batch: self._embed_audio(batch, sampling_rate), clips, self.batch_size, "CLAP audio")

    def probabilities(self, *, audio: np.ndarray, text: Sequence[str], sampling_rate: int) -> np.ndarray:
        """Softmax over captions of CLAP's audio-to-caption logits: A_CLAP of IMSM.

        Args:
            audio: `[N, T]`.
            text: C captions.
            sampling_rate: The sampling rate of `audio`, in Hz.

        Returns:
            `[N, C]`, rows summing to 1.

        Raises:
            ValueError: As `embed` does.
            TypeError: As `embed` does.
        """
        logits = self.embed(audio=audio, sampling_rate=sampling_rate) @ self.embed(text=text).T
        return softmax(self.model.logit_scale_a.exp().item() * logits.astype(np.float64), axis=1)

    def _embed_text(self, texts):
        tokens = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output

    def _embed_audio(self, clips, sampling_rate):
        extractor = self.processor.feature_extractor
        clips = _resample(clips, sampling_rate, extractor.sampling_rate)
        start = max(0, clips.shape[1] - extractor.nb_max_samples) // 2
        clips = clips[:, start : start + extractor.nb_max_samples]
        features = extractor(list(clips), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        inputs = features["input_features"].to(self.model.dtype).to(self.model.device)
        is_longer = torch.zeros(len(clips), 1, dtype=torch.bool, device=self.model.device)
        return self.model.get_audio_features(inputs, is_longer=is_longer).pooler_output


class ClipExtractor:
    """CLIP (Radford et al., arXiv 2103.00020): pictures and texts in one space, for IMSM and the CLIP score.

    Args:
        model: A `CLIPModel`.
        processor: Its `CLIPProcessor`.
        batch_size: Number of pictures or texts a forward pass.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, batch_size: int = 8):
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, device="cpu", dtype=torch.float32, batch_size=8):
        """Load from a Hub id such as `openai/clip-vit-large-patch14`, or a folder that model and processor saved.

        Arguments are those of `ClapExtractor.from_pretrained`.
        """
        model = _load_model(CLIPModel, pretrained_model_name_or_path, dtype)
        return cls(model.to(device), CLIPProcessor.from_pretrained(pretrained_model_name_or_path), batch_size)

    def embed(self, *, images: Sequence[Image.Image] | None = None, text: Sequence[str] | None = None) -> np.ndarray:
        """Embed pictures or texts.

        Args:
            images: N PIL images.
            text: N strings.

        Returns:
            `[N, D]`, rows of unit length.

        Raises:
            ValueError: If not exactly one of both is given, or it is empty.
            TypeError: If an item is no PIL image or no string.
        """
        if (images is None) == (text is None):
            raise ValueError("Give either `images` or `text`.")
        if images is None:
            return _in_batches(self._embed_text, _check_text(text), self.batch_size, "CLIP text")
        return _in_batches(self._embed_images, _check_images(images), self.batch_size, "CLIP images")

    def probabilities(self, *, images: Sequence[Image.Image], text: Sequence[str]) -> np.ndarray:
        """Softmax over captions of CLIP's image-to-caption logits: A_CLIP of IMSM.

        Args:
            images: N PIL images.
            text: C captions.

        Returns:
            `[N, C]`, rows summing to 1.

        Raises:
            ValueError: As `embed` does.
            TypeError: As `embed` does.
        """
        logits = self.embed(images=images) @ self.embed(text=text).T
        return softmax(self.model.logit_scale.exp().item() * logits.astype(np.float64), axis=1)

    def _embed_text(self, texts):
        tokens = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return torch.nn.functional.normalize(features, dim=-1)

    def _embed_images(self, images):
        pixels = self.processor.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
        pixels = pixels["pixel_values"].to(self.model.dtype).to(self.model.device)
        return torch.nn.functional.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)


class _AudioExtractor:
    """What extractors of audio share. @public

    Args:
        model: The network.
        batch_size: Number of clips a forward pass.
    """

    # Children set `sampling_rate` and define `_forward`: clips [B, T] at that rate -> embeddings, logits.
    def __init__(self, model: torch.nn.Module, batch_size: int = 8):
        self.model, self.batch_size = model.eval(), batch_size

    def embed(self, *, audio: np.ndarray, sampling_rate: int) -> np.ndarray:
        """Embed clips.

        Args:
            audio: `[N, T]`.
            sampling_rate: The sampling rate of `audio`, in Hz.

        Returns:
            `[N, D]`, or `[N, F, D]` where the class says so.

        Raises:
            ValueError: If the audio is empty, NaN, silent, too short or not mono, or there is no sample rate.
        """
        return self._run(audio, sampling_rate, 0)

    def _run(self, audio, sampling_rate, output):
        def forward(clips):
            return self._forward(_resample(clips, sampling_rate, self.sampling_rate))[output]

        return _in_batches(forward, _check_audio(audio, sampling_rate), self.batch_size, type(self).__name__)


class _AudioClassifier(_AudioExtractor):
    """What extractors share whose network classifies audio. @public"""

    def probabilities(self, *, audio: np.ndarray, sampling_rate: int) -> np.ndarray:
        """Softmax over the classes' logits, as this field's KL takes it though AudioSet's classes are not exclusive.

        Args:
            audio: `[N, T]`.
            sampling_rate: The sampling rate of `audio`, in Hz.

        Returns:
            `[N, classes]`, rows summing to 1.

        Raises:
            ValueError: As `embed` does.
        """
        return softmax(self._run(audio, sampling_rate, 1).astype(np.float64), axis=1)


class AstExtractor(_AudioClassifier):
    """Audio Spectrogram Transformer (Gong et al., arXiv 2104.01778), for FD and KL.

    The embedding is the pooled output that the classifier reads. What exceeds the window (10.24 s) is cut off.

    Args:
        model: An `ASTForAudioClassification`.
        feature_extractor: Its `ASTFeatureExtractor`, which sets the sample rate and the window.
        batch_size: Number of clips a forward pass.
    """

    def __init__(self, model: ASTForAudioClassification, feature_extractor: ASTFeatureExtractor, batch_size: int = 8):
        super().__init__(model, batch_size)
        self.feature_extractor, self.sampling_rate = feature_extractor, feature_extractor.sampling_rate

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, device="cpu", dtype=torch.float32, batch_size=8):
        """Load from a Hub id such as `MIT/ast-finetuned-audioset-10-10-0.4593`, or from a folder.

        Arguments are those of `ClapExtractor.from_pretrained`.
        """
        name = pretrained_model_name_or_path
        model = _load_model(ASTForAudioClassification, name, dtype)
        return cls(model.to(device), ASTFeatureExtractor.from_pretrained(name), batch_size)

    def _forward(self, clips):
        features = self.feature_extractor(list(clips), sampling_rate=self.sampling_rate, return_tensors="pt")
        inputs = features["input_values"].to(self.model.dtype).to(self.model.device)
        pooled = self.model.audio_spectrogram_transformer(inputs).pooler_output
        return pooled, self.model.classifier(pooled)


class PannsExtractor(_AudioClassifier):
    """PANNs CNN14 at 32 kHz (Kong et al., arXiv 1912.10211), for FD and KL as AudioLDM reports them.

    Needs `pip install panns-hear`, its authors' package, since their panns-inference downloads when it is imported.
    The published `Cnn14_mAP=0.431.pth` holds the state dict under the key `model`.
    """

    sampling_rate = 32000

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, device="cpu", batch_size=8):
        """Load from a Hub id, or a folder, that holds the converted `model.safetensors`.

        Arguments are those of `ClapExtractor.from_pretrained`.
        """
        models = _import_extra("panns_hear.models", "panns-hear")
        model = models.Cnn14(
            sample_rate=32000, window_size=1024, hop_size=320, mel_bins=64, fmin=50, fmax=14000, classes_num=527
        )
        return cls(_load_weights(model, pretrained_model_name_or_path).to(device), batch_size)

    def _forward(self, clips):
        embedding = self.model(_to_device_of(self.model, clips))["embedding"]
        return embedding, self.model.fc_audioset(embedding)


class PasstExtractor(_AudioClassifier):
    """PaSST-S at 32 kHz (Koutini et al., arXiv 2110.05069), for KL as MusicGen and Stable Audio report it.

    Needs `pip install hear21passt`, with the torchvision and torchaudio built for the installed torch. The published
    weights are `passt-s-f128-p16-s10-ap.476-swa.pt`. Clips above 10 s are averaged over windows of 10 s.
    """

    sampling_rate = 32000

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, device="cpu", batch_size=8):
        """Load from a Hub id, or a folder, that holds the converted `model.safetensors`.

        Arguments are those of `ClapExtractor.from_pretrained`.
        """
        passt = _import_extra("hear21passt.models.passt", "hear21passt")
        preprocess = _import_extra("hear21passt.models.preprocess", "hear21passt")
        wrapper = _import_extra("hear21passt.wrapper", "hear21passt")
        network = passt.get_model("passt_s_swa_p16_128_ap476", pretrained=False)
        mel = preprocess.AugmentMelSTFT(norm=1, fmin_aug_range=10, fmax_aug_range=2000)
        model = wrapper.PasstBasicWrapper(mel, _load_weights(network, pretrained_model_name_or_path), mode="all")
        return cls(model.to(device), batch_size)

    def _forward(self, clips):
        logits, embedding = self.model.get_scene_embeddings(_to_device_of(self.model, clips)).split([527, 768], dim=1)
        return embedding, logits


class VggishExtractor(_AudioExtractor):
    """VGGish at 16 kHz, the embedding of FAD (Kilgour et al., arXiv 1812.08466): `[N, F, 128]`, a frame each 0.96 s.

    The last layer's output is taken before its ReLU. Needs `pip install torchvggish soundfile`; the published weights
    are `vggish-10086976.pth`.
    """

    sampling_rate = 16000

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, device="cpu", batch_size=8):
        """Load from a Hub id, or a folder, that holds the converted `model.safetensors`.

        Arguments are those of `ClapExtractor.from_pretrained`.
        """
        torchvggish = _import_extra("torchvggish", "torchvggish soundfile")
        model = torchvggish.VGG(torchvggish.make_layers(), postprocess=False)
        return cls(_load_weights(model, pretrained_model_name_or_path).to(device), batch_size)

    def _forward(self, clips):
        waveform_to_examples = _import_extra("torchvggish", "torchvggish soundfile").waveform_to_examples
        frames = np.stack([waveform_to_examples(clip, self.sampling_rate, return_tensor=False) for clip in clips])
        features = self.model.features(_to_device_of(self.model, frames.astype(np.float32)).flatten(0, 1).unsqueeze(1))
        embedding = self.model.embeddings[:-1](features.permute(0, 2, 3, 1).flatten(1))
        return embedding.unflatten(0, frames.shape[:2]), None


class LogMelExtractor(_AudioExtractor):
    """Fixed embedding without learned weights, `[N, 128]`: mean and standard deviation over time of 64 log-mel bands.

    For FAD and KAD where no learned embedding is at hand; its figures cannot be compared with published ones. The
    spectrogram is that of AudioLDM: 16 kHz, magnitude of a 1024-point STFT at a hop of 160, Slaney bands to 8 kHz,
    natural logarithm floored at 1e-5.

    Args:
        device: Where it runs.
        batch_size: Number of clips a forward pass.
    """

    sampling_rate = 16000

    def __init__(self, device="cpu", batch_size: int = 8):
        self.batch_size = batch_size
        filters = mel_filter_bank(513, 64, 0, 8000, self.sampling_rate, norm="slaney", mel_scale="slaney")
        self.filters = torch.tensor(filters.T, dtype=torch.float32, device=device)
        self.window = torch.hann_window(1024, device=device)

    def _forward(self, clips):
        clips = torch.from_numpy(clips).to(self.window.device)
        spectrum = torch.stft(clips, 1024, 160, window=self.window, return_complex=True).abs()
        log_mel = (self.filters @ spectrum).clamp(min=1e-5).log()
        return torch.cat([log_mel.mean(-1), log_mel.std(-1)], dim=1), None


@torch.no_grad()
def _in_batches(forward: Callable, items: Sequence, batch_size: int, description: str) -> np.ndarray:
    # Results stay on the device until the last batch, so that an accelerator is waited for only once.
    starts = logging.tqdm(range(0, len(items), batch_size), desc=description)
    return torch.cat([forward(items[start : start + batch_size]) for start in starts]).float().cpu().numpy()


def _resample(clips, sampling_rate, target):
    common = math.gcd(int(sampling_rate), target)
    return resample_poly(clips, target // common, int(sampling_rate) // common, axis=-1).astype(np.float32)


def _to_device_of(model, array):
    return torch.from_numpy(array).to(next(model.parameters()).device)


def _import_extra(module, packages):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"This extractor needs an optional package: `pip install {packages}` ({error}).") from error


def _load_model(model_class, name, dtype):
    wanted = model_class.config_class.model_type
    try:
        found = model_class.config_class.get_config_dict(name)[0]
    except OSError as error:
        raise OSError(f"{str(name)!r} is no model, neither a folder nor on the Hub: {error}") from error
    if found.get("model_type", wanted) != wanted:
        raise ValueError(f"{str(name)!r} holds a model of the type {found['model_type']!r}, but {wanted!r} is needed.")
    model, report = model_class.from_pretrained(name, dtype=dtype, use_safetensors=True, output_loading_info=True)
    # Transformers would draw them at random.
    if missing := sorted(set(report["missing_keys"]) & {weight for weight, _ in model.named_parameters()}):
        raise ValueError(f"{str(name)!r} lacks {len(missing)} weights, {missing[0]} the first of them: load it anew.")
    return model


def _load_weights(model, name):
    folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns="model.safetensors")
    path = os.path.join(folder, "model.safetensors")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist: convert the published pickle as `{__name__}` describes.")
    load_model(model, path)
    return model


def _check_audio(audio, sampling_rate):
    if not isinstance(sampling_rate, Integral) or sampling_rate <= 0:
        raise ValueError(f"`sampling_rate` must be the audio's rate in Hz, a positive integer, got {sampling_rate!r}.")
    try:
        clips = np.asarray(audio)
    except ValueError as error:
        raise ValueError("The clips of `audio` must be equally long: crop them to the shortest.") from error
    if clips.ndim != 2 or clips.size == 0 or not np.issubdtype(clips.dtype, np.floating):
        raise ValueError(f"`audio` must be mono floats of shape [N, T], got {clips.dtype} of shape {clips.shape}.")
    if clips.shape[1] < sampling_rate:
        raise ValueError(f"`audio` must last at least a second, got {clips.shape[1]} samples at {sampling_rate} Hz.")
    broken, silent = ~np.isfinite(clips).all(1), (np.abs(clips) < 1e-5).all(1)
    if broken.any():
        raise ValueError(f"Clip {np.argmax(broken)} of `audio` has NaN or infinite samples: remove or repair it.")
    if silent.any():
        raise ValueError(f"Clip {np.argmax(silent)} of `audio` is silent: remove it, no metric of it means much.")
    return clips


def _check_images(images):
    images = list(images)
    if not images:
        raise ValueError("`images` must not be empty.")
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(f"`images` must be PIL images, got {type(image).__name__} at {index}: open it with PIL.")
    return images


def _check_text(text):
    if isinstance(text, str) or not all(isinstance(item, str) for item in text):
        raise TypeError(f"`text` must be a sequence of strings, got {text!r:.80}: put one string into a list.")
    if not len(text):
        raise ValueError("`text` must not be empty.")
    return list(text)
