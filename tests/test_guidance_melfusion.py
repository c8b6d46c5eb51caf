import pytest
import torch
from conftest import assert_near

from melfusion_pipeline.guidance_melfusion import Guidance, branch_alphas


@pytest.mark.parametrize(
    ("scales", "num_branches"), [((1.0,), 1), ((0.0,), 1), ((1.1,), 2), ((3.0, 2.0), 3), ((1.0, 0.5), 3)]
)
def test_the_scales_decide_on_the_branches(scales, num_branches):
    assert Guidance(*scales).num_branches == num_branches


def test_two_branches_are_classifier_free_guidance():
    free, text = torch.randn(2, 3, 4).double()
    assert_near(Guidance(2.5).combine(torch.cat([free, text])), (1 - 2.5) * free + 2.5 * text)


def test_three_branches_are_the_equation_of_instructpix2pix():
    free, image, text = torch.randn(3, 2, 4).double()
    expected = free + 1.7 * (image - free) + 2.5 * (text - image)
    assert_near(Guidance(2.5, 1.7).combine(torch.cat([free, image, text])), expected)


def test_without_guidance_nothing_changes():
    noise_pred = torch.randn(2, 4)
    assert Guidance(1.0).combine(noise_pred) is noise_pred


@pytest.mark.parametrize("scales", [(1.0,), (2.0,), (2.0, 3.0)])
def test_the_prompt_is_in_the_last_branch_and_the_negative_one_in_all_others(scales):
    guidance = Guidance(*scales)
    prompts, negative_prompts = {"class_labels": torch.randn(4, 8)}, {"class_labels": torch.randn(4, 8)}
    joined = guidance.join(prompts, negative_prompts if guidance.num_branches > 1 else None)
    *others, last = joined["class_labels"].chunk(guidance.num_branches)
    assert len(joined["class_labels"]) == 4 * guidance.num_branches
    assert torch.equal(last, prompts["class_labels"])
    assert all(torch.equal(other, negative_prompts["class_labels"]) for other in others)
    assert torch.equal(guidance.last(joined)["class_labels"], prompts["class_labels"])


def test_only_the_first_of_three_branches_does_not_see_the_picture():
    alphas = torch.tensor([0.25, -0.5])
    assert torch.equal(branch_alphas(alphas), torch.tensor([[0.0, 0.25, 0.25], [0.0, -0.5, -0.5]]))
