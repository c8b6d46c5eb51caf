"""Music that is already there: taking it in, which stretches of it are made anew, and how old and new are joined."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler

from .waveforms_melfusion import PEAK, check_sampling_rate, check_waveform, resample

# Over this time old and new pass into each other, inside of what is made anew.
FADE_IN_S = 0.03
# At a join the levels of this much old and new music are matched, by at most this factor. Among 0.25, 0.5, 1 and 2 s
# this is the one with which the level changed at 96 joins as much as in real clips at random places.
LEVEL_IN_S = 1.0
MAX_LEVEL_CHANGE = 4.0
# What is made at the level of dense music, whose peaks are low, would rise above full scale: this far around such a
# peak it is turned down.
LIMIT_IN_S = 0.02


def as_waveforms(
    audio: np.ndarray | torch.Tensor,
    audio_sampling_rate: int | None,
    sampling_rate: int,
    limits_in_s: tuple[float, float],
) -> torch.Tensor:
    """Takes in what a user calls audio: mono, at the pipeline's rate.

    Args:
        audio: `[samples]`, `[channels, samples]` or `[pieces, channels, samples]`, floating-point. Channels are
            averaged. Mono at `sampling_rate` stays as it is, bit for bit.
        audio_sampling_rate: Its rate, in Hz.
        sampling_rate: The pipeline's, in Hz.
        limits_in_s: The least and the greatest length; anything else is refused before it is resampled.

    Returns:
        float32 `[pieces, samples]`, on the CPU.

    Raises:
        TypeError: If `audio` is not a floating-point array or tensor.
        ValueError: If it is empty, too short, too long, not finite or of another shape, or its rate is missing or
            none.
    """
    if not isinstance(audio, (np.ndarray, torch.Tensor)):
        raise TypeError(
            f"`audio` must be a numpy array or a torch tensor, but is a {type(audio).__name__}: `load_audio` of"
            " `melfusion_pipeline.audio` gives that of a file, and its rate."
        )
    if audio_sampling_rate is None:
        raise ValueError(
            "`audio_sampling_rate` must come with `audio`: its rate in Hz, `pipe.sampling_rate` for music of `pipe`."
        )
    check_sampling_rate(audio_sampling_rate, "audio_sampling_rate")
    waveforms = check_waveform(audio, "audio").detach().cpu()
    shape = list(waveforms.shape)
    if waveforms.ndim > 3:
        raise ValueError(f"`audio` must be [samples], [channels, samples] or a batch of these, got {shape}.")
    waveforms = waveforms[(None,) * (3 - waveforms.ndim)]
    if 1 < waveforms.shape[-1] < waveforms.shape[-2]:
        raise ValueError(f"`audio` has more channels than samples: {shape}. Transpose it to [channels, samples].")
    seconds = waveforms.shape[-1] / audio_sampling_rate
    if not limits_in_s[0] <= seconds <= limits_in_s[1]:
        raise ValueError(
            f"`audio` must last {limits_in_s[0]:g} to {limits_in_s[1]:g} s, got {seconds:g} s:"
            f" {waveforms.shape[-1]} samples at {audio_sampling_rate} Hz."
        )
    return resample(waveforms.double().mean(dim=1), audio_sampling_rate, sampling_rate).float()


def as_stretches(
    mask_start_in_s: float | list[float] | None, mask_end_in_s: float | list[float] | None, given_length_in_s: float
) -> list[tuple[float, float]]:
    """Pairs the starts and ends of masks.

    Args:
        mask_start_in_s: One number or a list, in seconds; None is the beginning of the given music.
        mask_end_in_s: Likewise; None is its end.
        given_length_in_s: The length of the given music, in seconds.

    Returns:
        `(start, end)` of each stretch; none if both are None.

    Raises:
        ValueError: If there are more of the one than of the other.
    """
    if mask_start_in_s is None and mask_end_in_s is None:
        return []
    starts, ends = (
        list(bounds) if isinstance(bounds, (list, tuple)) else [bounds]
        for bounds in (
            bounds.tolist() if isinstance(bounds, (np.ndarray, torch.Tensor)) and bounds.ndim else bounds
            for bounds in (
                0.0 if mask_start_in_s is None else mask_start_in_s,
                given_length_in_s if mask_end_in_s is None else mask_end_in_s,
            )
        )
    )
    if len(starts) != len(ends):
        raise ValueError(
            f"`mask_start_in_s` names {len(starts)} stretches and `mask_end_in_s` {len(ends)}: pass one of either for"
            " each stretch."
        )
    return list(zip(starts, ends))


@dataclass(frozen=True)
class GivenAudio:
    """Given music and the stretches of a piece that are made anew; without any, all of it is varied.

    Args:
        waveforms: float32 `[pieces, samples]`, as `as_waveforms` gives them.
        sampling_rate: Their rate, in Hz.
        num_samples: The length of the piece; beyond `waveforms` it goes on.
        stretches: First sample and the one after the last of each stretch, ascending, none touching another.
    """

    waveforms: torch.Tensor
    sampling_rate: int
    num_samples: int
    stretches: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, waveforms: torch.Tensor, sampling_rate: int, stretches: list[tuple[float, float]], length_in_s: float
    ) -> "GivenAudio":
        """Counts in samples what is given in seconds; what lies beyond the given music is a stretch too.

        Args:
            waveforms: `[pieces, samples]`, as in the class.
            sampling_rate: See the class.
            stretches: Start and end of each, in seconds, ascending.
            length_in_s: The length of the piece, in seconds.

        Returns:
            The given music, stretches that touch made one.
        """
        given, num_samples = waveforms.shape[-1], round(length_in_s * sampling_rate)
        bounds = [tuple(round(float(bound) * sampling_rate) for bound in stretch) for stretch in stretches]
        bounds += [(given, num_samples)] * (num_samples > given)
        merged = []
        for first, last in bounds:
            if merged and merged[-1][1] == first:
                first = merged.pop()[0]
            merged.append((first, min(last, num_samples)))
        return cls(waveforms, sampling_rate, num_samples, tuple(merged))

    @property
    def goes_on(self) -> bool:
        """Whether the piece is longer than what was given."""
        return self.num_samples > self.waveforms.shape[-1]

    def anew(self, samples_per_frame: int, num_frames: int) -> torch.Tensor:
        """Tells which latent frames are made: those of which a stretch holds a part; all without stretches.

        Args:
            samples_per_frame: The samples of a latent frame.
            num_frames: The latent frames of the piece.

        Returns:
            bool `[num_frames]`.
        """
        anew = torch.zeros(num_frames, dtype=torch.bool, device="cpu")
        for first, last in self.stretches or [(0, num_frames * samples_per_frame)]:
            anew[first // samples_per_frame : math.ceil(last / samples_per_frame)] = True
        return anew

    def join(self, made: torch.Tensor) -> torch.Tensor:
        """Puts what was made at the level of the given music, and the given samples back around the stretches.

        A stretch begins and ends with a short equal-power fade inside of it: from the samples that stood there, or,
        where there were none, from the last ones before, backwards. No peak of a stretch is above full scale, or above
        the given music's highest where that is louder: a file of the piece need not be turned down as a whole.

        Args:
            made: `[pieces * variations, samples]`, at AudioLDM's level.

        Returns:
            As `made`. Outside of the stretches it is the given samples, bit for bit.
        """
        given = self.waveforms.repeat_interleave(len(made) // len(self.waveforms), dim=0)
        offset = given.mean(dim=-1, keepdim=True)
        scale = (given - offset).abs().amax(dim=-1, keepdim=True) / PEAK
        ceiling = given.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
        if not self.stretches:
            return made * scale + offset
        # Levels are compared where the music has AudioLDM's: what counts as silent does not depend on its own.
        normalized = (given - offset) / scale
        num_beyond = self.num_samples - given.shape[-1]
        mirrored = min(num_beyond, round(FADE_IN_S * self.sampling_rate), given.shape[-1] - 1)
        joined = F.pad(F.pad(given, (0, mirrored), mode="reflect"), (0, num_beyond - mirrored))
        for index, (first, last) in enumerate(self.stretches):
            angle = self._fade(first, last) * (math.pi / 2)
            old = joined[:, first:last] - offset
            new = made[:, first:last] * self._gain(normalized, made, index) * scale
            new = _limit(new, ceiling, round(LIMIT_IN_S * self.sampling_rate))
            mixed = old * angle.cos() + new * angle.sin() + offset
            # Within a fade, two loud signals may still add up.
            joined[:, first:last] = torch.minimum(torch.maximum(mixed, -ceiling), ceiling)
        return joined

    def _fade(self, first: int, last: int) -> torch.Tensor:
        """How far each sample of a stretch is from old (0) to new (1): `[last - first]`."""
        length = min(round(FADE_IN_S * self.sampling_rate), max(1, (last - first) // 2))
        samples = torch.arange(last - first, device="cpu")
        begun = (samples + 0.5) / length if first > 0 else torch.ones_like(samples)
        left = (last - first - samples - 0.5) / length if last < self.num_samples else torch.ones_like(samples)
        return torch.minimum(begun, left).clamp(max=1)

    def _gain(self, given: torch.Tensor, made: torch.Tensor, index: int) -> torch.Tensor:
        """What brings a stretch to the levels beside it, from that before it to that behind it, even in decibels."""
        first, last = self.stretches[index]
        length = round(LEVEL_IN_S * self.sampling_rate)
        inside = min(length, last - first)
        before = self.stretches[index - 1][1] if index else 0
        after = self.stretches[index + 1][0] if index + 1 < len(self.stretches) else given.shape[-1]
        gains = []
        if before < first:
            old = given[:, max(before, first - length) : first]
            gains.append(_level_ratio(old, made[:, first : first + inside]))
        if last < after:
            gains.append(_level_ratio(given[:, last : min(after, last + length)], made[:, last - inside : last]))
        if not gains:
            return made.new_ones(1)
        return torch.lerp(gains[0].log(), gains[-1].log(), torch.linspace(0, 1, last - first, device="cpu")).exp()


def _limit(samples: torch.Tensor, ceiling: torch.Tensor, reach: int) -> torch.Tensor:
    """Turns `[batch, samples]` down around what is above `ceiling` `[batch, 1]`, from `2 * reach` samples away."""
    needed = (ceiling / samples.abs().clamp(min=1e-9)).clamp(max=1)
    if (needed == 1).all():
        return samples
    padded = F.pad(needed[:, None], (2 * reach, 2 * reach), value=1.0)
    lowest = -F.max_pool1d(-padded, 2 * reach + 1, stride=1)
    weights = torch.hann_window(2 * reach + 1, periodic=False, dtype=samples.dtype, device="cpu")
    # A mean of gains each of which suffices: it suffices too.
    return samples * F.conv1d(lowest, (weights / weights.sum())[None, None])[:, 0]


def _level_ratio(given: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """The level of given samples over that of made ones, `[batch, 1]`; 1 where either is silent."""
    levels = [samples.double().square().mean(dim=-1, keepdim=True).sqrt() for samples in (given, made)]
    silent = torch.minimum(*levels) < 1e-4
    ratio = torch.where(silent, 1.0, levels[0] / levels[1].clamp(min=1e-9))
    return ratio.clamp(1 / MAX_LEVEL_CHANGE, MAX_LEVEL_CHANGE).to(made.dtype)


@dataclass(frozen=True)
class GivenLatents:
    """The latents of given music through the steps of denoising.

    Args:
        latents: Those of the given music, without noise: `[waveforms, channels, time, frequency]`.
        noise: The call's initial noise, unscaled, of the same shape.
        kept: Which frames are the given ones at every noise level, bool `[time, 1]`; None if all are made.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    kept: torch.Tensor | None

    def begin(
        self, scaled_noise: torch.Tensor, scheduler: Any, timestep: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Gives the latents with which denoising begins.

        Args:
            scaled_noise: The noise at the scheduler's initial scale: what is made begins with it at strength 1.
            scheduler: Its `add_noise` is used.
            timestep: The first timestep, `[1]`.
            strength: As in `__call__`.

        Returns:
            Latents of the first timestep, shaped as `scaled_noise`.
        """
        if strength == 1.0 and self.kept is None:
            return scaled_noise
        noised = scheduler.add_noise(self.latents, self.noise, timestep)
        return noised if strength < 1.0 else torch.where(self.kept, noised, scaled_noise)

    def after_step(self, latents: torch.Tensor, scheduler: Any, timesteps: torch.Tensor, step: int) -> torch.Tensor:
        """Puts the given music, noised for the next step, around what is made.

        Args:
            latents: What step number `step` gave.
            scheduler: As in `begin`.
            timesteps: Those of the call.
            step: Counted from 0.

        Returns:
            As `latents`; around the stretches, those of the next timestep, and after the last step without noise.
        """
        is_last = step + 1 == len(timesteps)
        # The first half of a step of second order leaves the latents between two noise levels.
        if self.kept is None or ((step + 1) % scheduler.order and not is_last):
            return latents
        given = self.latents
        if not is_last:
            given = scheduler.add_noise(given, self.noise, timesteps[step + 1 : step + 2])
        return torch.where(self.kept, given, latents)


def timesteps_from(scheduler: Any, num_inference_steps: int, strength: float) -> torch.Tensor:
    """Leaves out the first timesteps, as image-to-image pipelines of diffusers count them.

    Args:
        scheduler: Its timesteps are set.
        num_inference_steps: Of a call without audio.
        strength: The share of them that is left, rounded down.

    Returns:
        The timesteps of the call, `[timesteps]`.
    """
    skipped = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
    if not skipped:
        return scheduler.timesteps
    if isinstance(scheduler, PNDMScheduler):
        # Wherever it begins, it takes its second timestep twice.
        timesteps = scheduler.timesteps.unique().flip(0)[skipped:]
        return torch.cat([timesteps[:2], timesteps[1:]])
    first = skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]
