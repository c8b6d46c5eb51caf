import numpy as np
import pytest
import torch
from conftest import assert_near
from diffusers import AutoencoderKL
from untrained import music_components

from melfusion_pipeline.decoding_melfusion import decoder_margin, vocoder_margin
from melfusion_pipeline.windows_melfusion import Windows

LAYOUTS = [(200, 64, 16, 0), (129, 64, 8, 0), (131, 64, 32, 0), (97, 10, 9, 0), (64, 64, 16, 0), (300, 64, 28, 12)]


def textbook_merge(parts: list[np.ndarray], starts: list[int], num_frames: int, margin: int) -> np.ndarray:
    """Section 9 of method.md in two plain loops, float64; parts `[length, F]`."""
    length = len(parts[0])
    merged = np.zeros((num_frames, parts[0].shape[1]))
    for frame in range(num_frames):
        numerator, denominator = 0.0, 0.0
        for start, part in zip(starts, parts):
            if start <= frame < start + length:
                left = frame - start + 0.5 - (margin if start > 0 else 0)
                right = start + length - frame - 0.5 - (margin if start + length < num_frames else 0)
                weight = max(min(left, right), 1e-9)
                numerator = numerator + weight * part[frame - start].astype(np.float64)
                denominator += weight
        merged[frame] = numerator / denominator
    return merged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_cover_the_piece_with_one_length_and_end_with_it(layout):
    num_frames, length, overlap, _ = layout
    windows = Windows.lay_out(*layout)
    assert windows.starts[0] == 0 and windows.starts[-1] + length == num_frames
    steps = np.diff(windows.starts)
    assert (steps[:-1] == length - overlap).all() and (steps <= length - overlap).all() and (steps > 0).all()
    longer = Windows.lay_out(num_frames + 500, *layout[1:])
    assert longer.starts[: len(windows) - 1] == windows.starts[:-1]


def test_a_piece_no_longer_than_a_window_is_one_window():
    for num_frames in (1, 9, 10):
        windows = Windows.lay_out(num_frames, 10, 4)
        assert windows.starts == (0,) and windows.length == num_frames
        assert torch.equal(windows.weight(0), torch.ones(num_frames).double())
    assert len(Windows.lay_out(11, 10, 4)) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_merging_is_the_textbooks_and_does_not_depend_on_the_groups(layout, size):
    windows = Windows.lay_out(*layout)
    torch.manual_seed(0)
    parts = torch.randn(len(windows), 2, 3, windows.length, 4)
    merged = torch.zeros(2, 3, windows.num_frames, 4)
    seen = []
    for group in windows.groups(size):
        windows.merge(merged, parts[group.start : group.stop], group)
        seen += group
    assert seen == list(range(len(windows)))
    at_once = torch.zeros_like(merged)
    windows.merge(at_once, parts, range(len(windows)))
    assert torch.equal(merged, at_once)
    expected = textbook_merge(list(parts[:, 1, 2].numpy()), windows.starts, windows.num_frames, windows.margin)
    assert_near(merged[1, 2], expected.astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_cut_and_merged_unchanged_is_the_signal(layout):
    windows = Windows.lay_out(*layout)
    signal = torch.randn(2, 3, windows.num_frames, 4)
    parts = windows.cut(signal, range(len(windows)))
    assert parts.shape == (len(windows), 2, 3, windows.length, 4)
    assert torch.equal(parts[-1], signal[..., windows.starts[-1] :, :])
    merged = torch.zeros_like(signal)
    windows.merge(merged, parts, range(len(windows)))
    assert_near(merged, signal)


def test_a_frame_that_one_window_holds_is_exactly_its_own():
    windows = Windows.lay_out(52, 20, 4)
    parts = torch.randn(3, 1, 20, 2)
    merged = torch.zeros(1, 52, 2)
    windows.merge(merged, parts, range(3))
    for index, (first, last) in enumerate([(0, 16), (20, 32), (36, 52)]):
        inside = slice(first - windows.starts[index], last - windows.starts[index])
        assert torch.equal(merged[:, first:last], parts[index][:, inside])


def test_margins_are_discarded_except_at_the_ends_of_the_piece():
    windows = Windows.lay_out(100, 40, 20, margin=8)
    for index in range(len(windows)):
        weight = windows.weight(index)
        assert (weight[:8] == 1).all() if index == 0 else (weight[:8] < 1e-8).all()
        assert (weight[-8:] == 1).all() if index == len(windows) - 1 else (weight[-8:] < 1e-8).all()


def test_shares_are_those_counted_frame_by_frame():
    starts = (0.0, 40.0, 44.0, 150.0)
    windows = Windows.lay_out(200, 64, 16, image_starts=starts)
    owners = np.searchsorted(starts, np.arange(200), side="right") - 1
    for index, first in enumerate(windows.starts):
        expected = np.bincount(owners[first : first + 64], minlength=4) / 64
        assert_near(windows.shares[index], expected)
    alone = Windows.lay_out(200, 64, 16, image_starts=(0.0,))
    assert torch.equal(alone.shares, torch.ones(len(alone), 1, dtype=torch.float64))
    between = Windows.lay_out(64, 64, 0, image_starts=(0.0, 16.25)).shares
    assert_near(between, torch.tensor([[16.25 / 64, 47.75 / 64]], dtype=torch.float64))


def test_a_later_boundary_leaves_the_earlier_windows_shares():
    one, other = (Windows.lay_out(200, 64, 16, image_starts=(0.0, 40.0, last)).shares for last in (150.0, 170.0))
    assert torch.equal(one[:2], other[:2]) and not torch.equal(one, other)


def test_a_window_with_one_picture_sees_exactly_its_own_and_others_the_sum():
    windows = Windows.lay_out(44, 20, 8, image_starts=(0.0, 27.0, 28.0))
    assert windows.starts == (0, 12, 24)
    pictures = torch.randn(3, 5, 4)
    seen = windows.see(pictures, range(3))
    assert torch.equal(seen[0], pictures[0])
    assert_near(seen[1], (15 * pictures[0] + pictures[1] + 4 * pictures[2]) / 20)
    assert_near(seen[2], (3 * pictures[0] + pictures[1] + 16 * pictures[2]) / 20)
    assert torch.equal(windows.see(pictures, range(1, 3)), seen[1:])
    assert windows.see(pictures.half(), range(3)).dtype == torch.float16
    # A picture that no window of the group sees cannot spoil it.
    pictures[2] = torch.nan
    assert windows.see(pictures, range(1)).isfinite().all()
    assert Windows.lay_out(44, 20, 8).see(pictures, range(2)) is pictures


# ----------------------------------------------------------------------------------------------- decoding in windows


def autoencoder_of_convolutions(layers_per_block: int) -> AutoencoderKL:
    """AudioLDM's decoder without attention, and without the normalisation that looks at a whole window."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=layers_per_block,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    return vae.eval()


@torch.no_grad()
@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_the_decoders_margin_is_what_its_convolutions_look_at(layers_per_block):
    vae = autoencoder_of_convolutions(layers_per_block).double()
    latents = torch.randn(1, 4, 90, 2, dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 40:50] += 1
    differs = (vae.decode(latents).sample != vae.decode(changed).sample).any(dim=(0, 1, 3)).nonzero()[:, 0]
    reach = max(40 - differs[0].item() / 4, (differs[-1].item() + 1) / 4 - 50)
    assert decoder_margin(vae) - 1 < reach <= decoder_margin(vae)


@torch.no_grad()
@pytest.mark.parametrize("length", [64, 80, 100])
def test_without_normalisation_and_attention_decoding_does_not_depend_on_the_cut(length):
    vae = autoencoder_of_convolutions(layers_per_block=1)
    margin = decoder_margin(vae)
    latents = torch.randn(2, 4, 300, 2)
    whole = vae.decode(latents).sample
    windows = Windows.lay_out(300, length, 2 * margin + 8, margin)
    cut = windows.apply(lambda window, _: vae.decode(window).sample, latents, factor=4)
    assert len(windows) > 3 and cut.shape == whole.shape
    assert_near(cut, whole)
    careless = Windows.lay_out(300, length, 8).apply(lambda window, _: vae.decode(window).sample, latents, factor=4)
    assert (careless - whole).abs().max() > 1e-3 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("length", [90, 128, 200])
def test_the_waveform_does_not_depend_on_how_the_vocoder_was_cut(length):
    vocoder = music_components(mel_bands=8)["vocoder"].eval()
    mel = torch.randn(2, 600, 8)
    whole = vocoder(mel)
    # AudioLDM's vocoder gives some samples more than frames times hop: those do not belong to the next window.
    assert whole.shape[1] == 600 * 160 + 32
    margin = vocoder_margin(vocoder)
    assert 0 < margin < 42
    windows = Windows.lay_out(600, length, 2 * margin + 1, margin)
    updates = []
    cut = windows.apply(lambda window, _: vocoder(window)[..., None], mel, 160, lambda: updates.append(1))[..., 0]
    assert cut.shape == (2, 600 * 160) and len(updates) == len(windows) > 2
    assert_near(cut, whole[:, : 600 * 160])


@torch.no_grad()
def test_a_vocoders_margin_is_found_for_both_sides_and_bounded():
    class Shifted(torch.nn.Module):
        """Looks `left` frames back and `right` frames ahead."""

        def __init__(self, left: int, right: int) -> None:
            super().__init__()
            self.left, self.right = left, right
            self.config = type("Config", (), {"model_in_dim": 4, "upsample_rates": [2, 5]})
            self.device, self.dtype = torch.device("cpu"), torch.float32

        def forward(self, mel: torch.Tensor) -> torch.Tensor:
            level = torch.nn.functional.pad(mel.mean(-1), (self.left, self.right))
            return level.unfold(1, self.left + self.right + 1, 1).sum(-1).repeat_interleave(10, dim=1)

    assert vocoder_margin(Shifted(7, 2), num_frames=90) == 7
    assert vocoder_margin(Shifted(1, 9), num_frames=90) == 9
    assert vocoder_margin(Shifted(0, 0), num_frames=90) == 0
    assert vocoder_margin(Shifted(200, 200), num_frames=90) == 30
