import pytest
import torch
from conftest import assert_near

from melfusion_pipeline.prompts_melfusion import ClapPrompts, prompts_of_windows, repeat_prompts
from melfusion_pipeline.windows_melfusion import Windows

# Two windows: the first sees a quarter of the second picture, the last sees the second and the third by half.
STORY = Windows(12, 8, (0, 4), image_starts=(0.0, 6.0, 8.0))


def embeddings(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, 6, dtype=torch.float64), dim=-1)


def test_each_prompt_gets_a_row_for_each_waveform():
    rows = embeddings(2)
    repeated = repeat_prompts({"class_labels": rows}, 2, 3)["class_labels"]
    assert torch.equal(repeated, rows[[0, 0, 0, 1, 1, 1]])
    assert torch.equal(repeat_prompts({"class_labels": rows[:1]}, 2, 1)["class_labels"], rows[[0, 0]])


def test_all_windows_of_a_piece_hear_its_prompt(pipe):
    """Rows are (branch, prompt, window, waveform): as many waveforms as windows, so that a swap would show."""
    rows = embeddings(2, 3, 2)
    arguments = {"class_labels": rows.flatten(0, 2)}
    windows = Windows.lay_out(12, 8, 4)
    found = prompts_of_windows(pipe.prompts, arguments, (2, -1, 2), windows, range(2))["class_labels"]
    expected = [rows[b, p, w] for b in range(2) for p in range(3) for _ in range(2) for w in range(2)]
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("group", [range(2), range(1, 2)])
def test_a_window_hears_the_prompts_of_its_pictures_by_their_shares_at_full_length(pipe, group):
    rows = embeddings(2, 3, 2)
    found = prompts_of_windows(pipe.prompts, {"class_labels": rows.flatten(0, 2)}, (2, -1, 2), STORY, group)[
        "class_labels"
    ].unflatten(0, (2, len(group), 2))
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)[list(group)]
    mean = torch.einsum("wp,bpvc->bwvc", shares, rows)
    assert_near(found, mean / mean.norm(dim=-1, keepdim=True))


def test_one_prompt_serves_the_whole_storyboard(pipe):
    rows = embeddings(2, 1, 2)
    found = prompts_of_windows(pipe.prompts, {"class_labels": rows.flatten(0, 2)}, (2, -1, 2), STORY, range(2))
    assert torch.equal(found["class_labels"], rows.expand(2, 2, 2, 6).flatten(0, 2))


def test_embeddings_come_back_from_the_arguments_that_they_became(pipe):
    embeds = embeddings(2)
    assert pipe.prompts.from_unet(pipe.prompts.to_unet(embeds)) is embeds


def test_a_prompt_of_another_shape_is_refused_by_name(pipe):
    family = ClapPrompts(pipe)
    assert family.check("prompt_embeds", torch.zeros(3, 32)) == 3
    with pytest.raises(ValueError, match=r"`prompt_embeds` must have the shape \[prompts, 32\], got \[3, 31\]"):
        family.check("prompt_embeds", torch.zeros(3, 31))
    with pytest.raises(TypeError, match="`negative_prompt_embeds` must be a torch tensor of floating-point"):
        family.check("negative_prompt_embeds", torch.zeros(3, 32, dtype=torch.long))
