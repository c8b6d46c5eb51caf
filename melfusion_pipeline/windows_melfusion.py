"""The time axis: cutting a long piece into windows, merging what comes of them, and which picture each window sees."""

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# A frame that only discarded margins cover would have the weight 0 / 0; this leaves it to the deeper of them.
LEAST_WEIGHT = 1e-9


@dataclass(frozen=True)
class Windows:
    """Windows of one length over the frames of a piece, neighbours overlapping, and how what they hold is merged.

    Implements `x[frame] = sum_w g(frame - start_w) x_w[frame] / sum_w g(frame - start_w)` (MultiDiffusion, arXiv
    2302.08113) with a triangle for g. With `margin` the triangle begins that many frames inside of the window: what
    lies in the margin is discarded, except at the piece's own ends. The axis of frames is the last but one.

    Args:
        num_frames: The frames of the piece.
        length: The frames of each window.
        starts: The first frame of each window, ascending; the last window ends at the piece's last frame.
        margin: The frames at either end of a window that are discarded where another window holds them too.
        image_starts: Where each picture of a storyboard begins, in frames, ascending from 0. The last one lasts to
            the end.
    """

    num_frames: int
    length: int
    starts: tuple[int, ...]
    margin: int = 0
    image_starts: tuple[float, ...] | None = None

    @classmethod
    def lay_out(
        cls,
        num_frames: int,
        length: int,
        overlap: int,
        margin: int = 0,
        image_starts: tuple[float, ...] | None = None,
    ) -> "Windows":
        """Lays windows on a fixed grid from frame 0 on; the last one is moved back to end at the last frame.

        Args:
            num_frames: The frames of the piece, at least 1.
            length: The frames of a window; a piece no longer than that is one window of its own length.
            overlap: The frames that neighbours share, in [0, length).
            margin: See the class; at most half of `overlap`.
            image_starts: See the class.

        Returns:
            The windows.
        """
        length = min(length, num_frames)
        # A single window has no neighbour, whatever the overlap.
        starts = range(0, num_frames - length, max(1, length - overlap))
        return cls(num_frames, length, (*starts, num_frames - length), margin, image_starts)

    def __len__(self) -> int:
        return len(self.starts)

    def groups(self, size: int) -> Iterator[range]:
        """Yields the windows' indices in groups of at most `size`."""
        for first in range(0, len(self), size):
            yield range(first, min(first + size, len(self)))

    def scaled(self, factor: int) -> "Windows":
        """Gives the same windows over an axis of `factor` times as many frames."""
        return Windows(
            self.num_frames * factor,
            self.length * factor,
            tuple(start * factor for start in self.starts),
            self.margin * factor,
        )

    def cut(self, signal: torch.Tensor, group: Iterable[int]) -> torch.Tensor:
        """Cuts a signal into windows.

        Args:
            signal: `[batch, ..., num_frames, F]`.
            group: The indices of the windows.

        Returns:
            `[windows, batch, ..., length, F]`.
        """
        return torch.stack([signal.narrow(-2, self.starts[index], self.length) for index in group])

    def weight(self, index: int) -> torch.Tensor:
        """Gives what window `index` contributes to each of its frames: float64 `[length]`; all windows' sum to 1."""
        start, last = self.starts[index], self.num_frames - self.length
        neighbours = tuple(
            (other - start, self.margin * (other > 0), self.margin * (other < last))
            for other in self.starts[
                bisect_right(self.starts, start - self.length) : bisect_left(self.starts, start + self.length)
            ]
        )
        return _normalised_weight(self.length, neighbours)

    def merge(self, merged: torch.Tensor, parts: Iterable[torch.Tensor], group: Iterable[int]) -> None:
        """Adds what the windows of a group hold to `merged`, which begins as zeros and is complete after all groups.

        The windows are added in their order, so that the result does not depend on the groups.

        Args:
            merged: `[batch, ..., num_frames, F]`, changed in place.
            parts: For each window of the group `[batch, ..., length, F]`.
            group: The indices of the windows.
        """
        for index, part in zip(group, parts, strict=True):
            weight = self.weight(index).to(device=merged.device, dtype=merged.dtype)
            merged.narrow(-2, self.starts[index], self.length).add_(part.to(merged.dtype) * weight[:, None])

    def apply(
        self,
        function: Callable[[torch.Tensor, int], torch.Tensor],
        signal: torch.Tensor,
        factor: int,
        update: Callable[[], Any] = lambda: None,
    ) -> torch.Tensor:
        """Runs `function` on one window after the other and merges what it gives.

        Args:
            function: `[batch, ..., length, F]` and the window's first frame to `[batch, ..., length * factor (or
                more), G]`.
            signal: `[batch, ..., num_frames, F]`.
            factor: How many frames come of one.
            update: Called after each window.

        Returns:
            `[batch, ..., num_frames * factor, G]`.
        """
        scaled, merged = self.scaled(factor), None
        for index in range(len(self)):
            part = function(self.cut(signal, [index])[0], self.starts[index]).narrow(-2, 0, scaled.length)
            if merged is None:
                merged = part.new_zeros(*part.shape[:-2], scaled.num_frames, part.shape[-1])
            scaled.merge(merged, [part], [index])
            update()
        return merged

    @functools.cached_property
    def shares(self) -> torch.Tensor:
        """The share of each window that each picture of the storyboard covers, float64 `[windows, pictures]`.

        Each row has the sum 1; it is exactly 1 for a picture alone in its window.
        """
        first = torch.tensor(self.starts, dtype=torch.float64, device="cpu")[:, None]
        begins = torch.tensor([*self.image_starts, math.inf], dtype=torch.float64, device="cpu")
        return begins.clamp(first, first + self.length).diff(dim=1) / self.length

    def see(self, of_pictures: torch.Tensor, group: range) -> torch.Tensor:
        """Gives each window of a group what it sees of the storyboard's pictures.

        A window on a boundary sees the sum of its pictures, weighted by their shares; a window with one picture
        exactly its own.

        Args:
            of_pictures: What each picture has, `[pictures, ...]`.
            group: The indices of the windows.

        Returns:
            `[windows, ...]`; without a storyboard `of_pictures` as it is.
        """
        if self.image_starts is None:
            return of_pictures
        seen = []
        for row in self.shares[group.start : group.stop]:
            pictures = row.nonzero()[:, 0].tolist()
            # A product with the share 1 would be the same, but for copies of what may be large.
            parts = [of_pictures[p] if row[p] == 1 else of_pictures[p] * row[p].item() for p in pictures]
            seen.append(sum(parts[1:], parts[0]))
        return torch.stack(seen)


@functools.lru_cache(maxsize=64)
def _normalised_weight(length: int, neighbours: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
    """A window's g over the sum of those of its neighbours, itself among them: their offsets and two margins each."""
    frames = torch.arange(length, dtype=torch.float64, device="cpu")
    weights = {
        offset: triangle(frames - offset, length, *margins) * ((frames >= offset) & (frames < offset + length))
        for offset, *margins in neighbours
    }
    return weights[0] / sum(weights.values())


def triangle(frames: torch.Tensor, length: int, left_margin: int = 0, right_margin: int = 0) -> torch.Tensor:
    """Gives the triangle g: the distance of each frame's middle from the window's nearer end, less the margin there.

    Args:
        frames: Frames counted from the window's first, `[frames]`.
        length: The frames of the window.
        left_margin: The frames at its beginning that are discarded.
        right_margin: The frames at its end that are discarded.

    Returns:
        `[frames]`, above 0 also where frames are discarded.
    """
    distance = torch.minimum(frames + 0.5 - left_margin, length - 0.5 - frames - right_margin)
    return distance.clamp(min=LEAST_WEIGHT)
