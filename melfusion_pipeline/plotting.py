"""Figures of what the pipeline makes and of what it looks at. Needs matplotlib, which the package does not require."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from .arguments_melfusion import check_integer, check_positive, check_reals
from .checks_melfusion import check_float_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_mel_spectrogram(mel_spectrogram: torch.Tensor, seconds_per_frame: float = 0.01, title: str = "") -> "Figure":
    """Draws a log-mel spectrogram.

    Args:
        mel_spectrogram: `[frames, bands]`, natural logarithm of the magnitude, as `output_type="mel"` gives it.
        seconds_per_frame: The hop of the spectrogram.
        title: Written above.

    Returns:
        A figure with time in seconds and mel band as its axes; `figure.savefig(path)` writes it.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the spectrogram is no tensor, or `seconds_per_frame` no number.
        ValueError: If the spectrogram has not two dimensions, or `seconds_per_frame` is not above 0.
    """
    _check_mel(mel_spectrogram)
    check_positive("seconds_per_frame", seconds_per_frame)
    frames, bands = mel_spectrogram.shape
    figure = _empty_figure(9, 3)
    axes = figure.subplots()
    mesh = axes.imshow(
        mel_spectrogram.detach().float().cpu().numpy().T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, frames * seconds_per_frame, 0, bands),
    )
    axes.set(title=title, xlabel="time (s)", ylabel="mel band")
    figure.colorbar(mesh, label="log magnitude")
    return figure


def plot_storyboard(
    pictures: Sequence[PIL.Image.Image],
    image_start_in_s: Sequence[float],
    mel_spectrogram: torch.Tensor,
    audio_length_in_s: float,
    cuts: Sequence[float] | None = None,
    onsets: Sequence[float] = (),
    title: str = "",
) -> "Figure":
    """Draws pictures over the music that they go with, on one time axis.

    Args:
        pictures: One a stretch.
        image_start_in_s: Where each picture begins, in seconds.
        mel_spectrogram: The whole music, `[frames, bands]`, natural logarithm of the magnitude.
        audio_length_in_s: Its length in seconds.
        cuts: Where what is seen changes, in seconds, drawn as lines through the music; None: where pictures begin.
        onsets: Where notes begin, in seconds, drawn as marks above the music.
        title: Written above.

    Returns:
        A figure with a strip of pictures, each at its beginning and as wide as its stretch leaves room for, above
        the spectrogram.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the spectrogram is no tensor, or another argument no number or no list of numbers.
        ValueError: If pictures and starts differ in number, a number is not finite, the length is not above 0, or the
            spectrogram has not two dimensions.
    """
    check_reals("image_start_in_s", image_start_in_s)
    check_reals("onsets", onsets)
    if cuts is not None:
        check_reals("cuts", cuts)
    check_positive("audio_length_in_s", audio_length_in_s)
    _check_mel(mel_spectrogram)
    if len(pictures) != len(image_start_in_s):
        raise ValueError(
            f"`image_start_in_s` must name a second for each picture, got {len(image_start_in_s)} for {len(pictures)}."
        )
    width, height, bands = 14.0, 1.5, mel_spectrogram.shape[1]
    figure = _empty_figure(width, 5)
    strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=(height, 3))
    inches_per_second = width / audio_length_in_s
    for picture, start, end in zip(pictures, image_start_in_s, [*image_start_in_s[1:], audio_length_in_s]):
        picture = PIL.ImageOps.exif_transpose(picture).convert("RGB")
        # No wider than its stretch; what lies outside of the middle is cut off.
        shown = min((end - start) * inches_per_second, height * picture.width / picture.height)
        size = (max(1, round(200 * shown)), round(200 * height))
        place = (start, start + shown / inches_per_second, 0, 1)
        strip.imshow(PIL.ImageOps.fit(picture, size), extent=place, aspect="auto")
        strip.axvline(start, color="black", linewidth=0.8)
    strip.set(ylim=(0, 1), yticks=[], title=title)
    strip.spines[:].set_visible(False)
    axes.imshow(
        mel_spectrogram.detach().float().cpu().numpy().T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, audio_length_in_s, 0, bands),
    )
    for cut in image_start_in_s[1:] if cuts is None else cuts:
        axes.axvline(cut, color="white", linestyle="--", linewidth=1.2)
    axes.plot(onsets, [1.02 * bands] * len(onsets), "v", color="C0", markersize=4, label="onsets", clip_on=False)
    axes.set(xlim=(0, audio_length_in_s), ylim=(0, bands), xlabel="time (s); dashed: cuts, marks: onsets")
    axes.set_ylabel("mel band")
    return figure


def plot_alphas(synapse: Any, title: str = "how much of each layer is the picture's") -> "Figure":
    """Draws the synapse's alphas, the deepest layer first.

    Args:
        synapse: A `VisualSynapse`.
        title: Written above.

    Returns:
        A figure with a bar a layer; the layers of one resolution share a colour.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    alphas, levels = synapse.alphas.detach().float().cpu().tolist(), synapse.config.music_levels
    figure = _empty_figure(8, 3)
    axes = figure.subplots()
    for level in sorted(set(levels), reverse=True):
        layers = [layer for layer, own in enumerate(levels, start=1) if own == level]
        label = f"latents / {2**level}"
        axes.bar(layers, [alphas[layer - 1] for layer in layers], color=f"C{max(levels) - level}", label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=title, xlabel="layer of the music UNet's decoder, deepest first", ylabel="alpha")
    axes.set_xticks(range(1, len(alphas) + 1))
    # Beside the bars: inside it would hide some of them.
    figure.legend(loc="outside right upper", title="resolution")
    return figure


def picture_influence(pipe: Any, image_features: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    """Measures which picture regions feed which music layer at which time, while the pipeline makes music.

    A layer's output is linear in its values, `O_i = sum_j A_ij (alpha V_j^I + (1 - alpha) V_j^M)` (visual synapse,
    MeLFusion, arXiv 2406.04673, section 3). So `alpha A_ij` is *the* weight with which the picture's value at position
    j enters the music at position i, whatever it was that attracted the attention there (the key is blended too).

    Position j is not one place of the picture: the synapse average-pools the row-major list of the picture's tokens to
    the music's, and recording pooled layers above 1,024 tokens before that. Each weight is therefore handed back in
    equal parts to the run of cells that was averaged: a stripe of neighbours in a row, or whole rows, never a square.
    In the deep layers the runs are long, and the map cannot be finer than they are.

    What another thread makes with the same UNet meanwhile would be measured too: do not share it.

    Args:
        pipe: A `MelFusionPipeline`.
        image_features: Those of one picture, as `pipe.encode_image` returns them.
        **arguments: What the pipeline is called with besides, such as `prompt` and `num_inference_steps`.

    Returns:
        For each music layer, deepest first, `[time, side, side]`, float32: the weight of each cell of the picture's
        square, `side` as in the picture layer that feeds it, averaged over frequency, heads, denoising steps and
        waveforms, in the guidance branch with picture and prompt. At each time the weights sum to the layer's alpha.

    Raises:
        ValueError: If the features are not of one picture of known size, or the synapse blends layers that attend to a
            text, whose tokens have no time.
    """
    if any(pipe.synapse.music_texts):
        raise ValueError(
            "`picture_influence` shows layers that attend to the music, but the synapse blends"
            f" {pipe.synapse.config.music_layers[0]} and others that attend to a text."
        )
    if image_features.num_images != 1 or image_features.image_size is None:
        raise ValueError(
            "`image_features` must be of one picture of known size, got"
            f" {image_features.num_images} pictures and image_size={image_features.image_size}: use what"
            " `pipe.encode_image(image)` returns for one picture."
        )
    config, bands = pipe.synapse.config, pipe.vocoder.config.model_in_dim // pipe.vae_scale_factor
    observers, hooks = {}, []
    for layer, image_layer, level in zip(config.music_layers, config.image_layers, config.music_levels):
        recorded = image_features.keys[image_layer].shape[-2]
        side = _picture_side(pipe, image_layer, image_features.image_size)
        observers[layer] = _AttentionObserver(recorded, side, _halve(bands, level))
    try:
        for layer, observer in observers.items():
            hooks.append(pipe.unet.get_submodule(layer).register_forward_pre_hook(observer))
        pipe(image_features=image_features, **{**arguments, "output_type": "latent"})
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: observer.mean() for layer, observer in observers.items()}


class _AttentionObserver:
    """A forward pre-hook of one attention layer: what its blending processor is about to weigh, computed beside it.

    Args:
        num_recorded: The picture's recorded tokens.
        side: The side of the picture layer's square; `side ** 2` tokens before recording pooled them.
        num_bands: The music layer's tokens along frequency.
    """

    def __init__(self, num_recorded: int, side: int, num_bands: int) -> None:
        self.num_recorded, self.side, self.num_bands = num_recorded, side, num_bands
        self.total, self.passes = 0.0, 0

    def __call__(self, attn: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Adds one pass; `inputs` starts with the hidden states `[branches * waveforms, tokens, channels]`."""
        processor, hidden_states = attn.processor, inputs[0]
        key = processor.blend(attn.to_k(hidden_states), processor.key)
        query, key = (attn.head_to_batch_dim(states) for states in (attn.to_q(hidden_states), key))
        weights = attn.get_attention_scores(query, key).float().unflatten(0, (processor.alpha.shape[0], -1))
        # The last branch sees picture and prompt; its rows are waveforms and heads.
        weights = weights[-1].mean(dim=0).unflatten(0, (-1, self.num_bands)).mean(dim=1)
        weights = weights * processor.alpha[-1].float().reshape(())
        self.total = self.total + self.to_cells(weights).cpu()
        self.passes += 1

    def to_cells(self, weights: torch.Tensor) -> torch.Tensor:
        """Hands weights of pooled tokens `[time, N_M]` back to the cells they cover, `[time, side, side]`."""
        for inputs, outputs in ((self.num_recorded, weights.shape[-1]), (self.side**2, self.num_recorded)):
            if inputs != outputs:
                weights = weights @ F.adaptive_avg_pool1d(torch.eye(inputs), outputs).T.to(weights)
        return weights.unflatten(-1, (self.side, self.side))

    def mean(self) -> torch.Tensor:
        """The weights `[time, side, side]`, averaged over the passes."""
        return self.total / self.passes


def _halve(length: int, times: int) -> int:
    # Negated floor division rounds up, as the UNet's strided convolutions do.
    return -(-length // 2**times)


def _picture_side(pipe: Any, image_layer: str, image_size: int) -> int:
    """The side of a picture layer's square of tokens; `image_layer` is a name such as `up_blocks.1.attentions...`."""
    level = len(pipe.image_unet.up_blocks) - 1 - int(image_layer.split(".")[1])
    return _halve(image_size // pipe.image_vae_scale_factor, level)


def plot_picture_influence(
    influence: dict[str, torch.Tensor], image: PIL.Image.Image, audio_length_in_s: float, num_spans: int = 4
) -> "Figure":
    """Draws which picture regions feed each music layer, on average and in each span of the music.

    Args:
        influence: What `picture_influence` returns.
        image: The picture; it is cropped to the square that the pipeline saw.
        audio_length_in_s: The length of the music in seconds.
        num_spans: How many equal spans the music is cut into.

    Returns:
        A figure with a row a layer, deepest first: the whole time, then the spans. A layer's alpha is written beside
        its row, the colour shows how that is shared out: 1 is an even share, red more, blue less, on a scale common to
        all panels. A layer with alpha = 0 takes nothing and stays without colour.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the length or `num_spans` is no number.
        ValueError: If it is out of range, or there is no layer.
    """
    check_positive("audio_length_in_s", audio_length_in_s)
    check_integer("num_spans", num_spans, 1)
    if not influence:
        raise ValueError(f"`influence` must be what `picture_influence` returns, got {influence!r}.")
    image = PIL.ImageOps.exif_transpose(image).convert("L")
    image = PIL.ImageOps.fit(image, (min(image.size),) * 2)
    spans = {layer: _shares_in_spans(weights, num_spans) for layer, weights in influence.items()}
    # At least a tenth, so that nearly even shares look even.
    strongest = max(1.1, *(float(shares.nan_to_num().max()) for shares in spans.values()))
    edges = [audio_length_in_s * span / num_spans for span in range(num_spans + 1)]
    titles = ["whole time", *(f"{start:.3g} to {end:.3g} s" for start, end in zip(edges, edges[1:]))]

    figure = _empty_figure(1.6 * (num_spans + 1) + 1.2, 1.6 * len(spans) + 0.6)
    grid = figure.subplots(len(spans), num_spans + 1, squeeze=False)
    for number, (layer, row) in enumerate(zip(spans, grid), start=1):
        alpha = float(influence[layer].sum(dim=(1, 2)).mean())
        row[0].set_ylabel(f"layer {number}\nalpha {alpha:.2f}")
        for axes, shares, title in zip(row, spans[layer], titles):
            # Paler than it is, so that the colours above it can be told apart.
            axes.imshow(image, cmap="gray", vmin=-255, vmax=255, extent=(0, 1, 0, 1))
            mesh = axes.imshow(
                shares.clamp(min=1 / strongest), cmap="RdBu_r", norm="log", alpha=0.6, extent=(0, 1, 0, 1)
            )
            mesh.set_clim(1 / strongest, strongest)
            axes.set(xticks=[], yticks=[], title=title if number == 1 else "")
    bar = figure.colorbar(mesh, ax=grid, label="share of the picture's weight (1: even)", shrink=0.6, aspect=30)
    bar.set_ticks([1 / strongest, 1, strongest], labels=[f"{1 / strongest:.2g}", "1", f"{strongest:.2g}"], minor=False)
    bar.minorticks_off()
    return figure


def _shares_in_spans(weights: torch.Tensor, num_spans: int) -> torch.Tensor:
    """Turns weights `[time, side, side]` into shares of an even share, `[1 + num_spans, side, side]`: whole, spans."""
    shares = weights.flatten(1) / weights.flatten(1).mean(dim=1, keepdim=True)
    spans = torch.cat([F.adaptive_avg_pool1d(shares.T, outputs) for outputs in (1, num_spans)], dim=1)
    return spans.T.unflatten(1, weights.shape[1:])


def _check_mel(mel_spectrogram: torch.Tensor) -> None:
    check_float_tensor("mel_spectrogram", mel_spectrogram)
    if mel_spectrogram.ndim != 2 or 0 in mel_spectrogram.shape:
        raise ValueError(f"`mel_spectrogram` must be [frames, bands], got {list(mel_spectrogram.shape)}.")


def _empty_figure(width: float, height: float) -> "Figure":
    """Makes a figure of `width` x `height` inches that needs no window system."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
