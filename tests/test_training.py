import multiprocessing
import re

import numpy as np
import pytest
import torch
import torch.distributed
from conftest import assert_near, photograph
from copies import untrained_components
from diffusers import AutoencoderTiny
from processes import start_anew
from torch.nn.parallel import DistributedDataParallel

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.adapters_melfusion import add_lora
from melfusion_pipeline.audio import waveform_to_latents
from melfusion_pipeline.caches import MusicLatentCache, TrajectoryCache
from melfusion_pipeline.training import MelFusionObjective, freeze

STEPS = 3


@pytest.fixture
def training_pipe() -> MelFusionPipeline:
    pipe = MelFusionPipeline(**untrained_components(mel_bands=64, latent_frames=16))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def batch(tmp_path) -> dict:
    return make_batch(tmp_path, 4)


def make_batch(folder, size: int) -> dict:
    torch.manual_seed(0)
    paths = [folder / f"{index}.png" for index in range(size)]
    for index, path in enumerate(paths):
        photograph(index, 40, 36).save(path)
    return {
        "waveforms": torch.randn(size, 10240) * 0.1,
        "captions": [f"music number {index}" for index in range(size)],
        "indices": torch.arange(size) + 100,
        "image_files": [str(path) for path in paths],
        "pixel_values": torch.rand(size, 3, 32, 32) * 2 - 1,
    }


def rows(batch: dict, index: slice) -> dict:
    return {name: values[index] for name, values in batch.items()}


def make_objective(pipe, folder=None, **kwargs) -> MelFusionObjective:
    """With a folder the pictures come from inversion trajectories, without one from noising."""
    trajectories = None if folder is None else TrajectoryCache(folder / "cache", pipe, STEPS, 32)
    freeze(pipe, kwargs.get("trainable", "synapse"))
    return MelFusionObjective(pipe, trajectories=trajectories, **kwargs).train()


@pytest.mark.parametrize("trainable", ["synapse", "lora", "unet"])
def test_gradients_reach_exactly_what_is_trained_and_the_rest_stays_bitwise(training_pipe, batch, tmp_path, trainable):
    pipe = training_pipe
    if trainable == "lora":
        add_lora(pipe.unet, rank=2)
    objective = make_objective(pipe, tmp_path, trainable=trainable)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = {
        name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()
    }
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    with objective.attached():
        for step in range(4):
            optimizer.zero_grad()
            objective(batch, step).backward()
            # Not in the first step, where the half of a LoRA that is zero lets no gradient reach the other one.
            if step == 1:
                reached = {
                    f"{name}.{key}"
                    for name, model in models.items()
                    for key, parameter in model.named_parameters()
                    if parameter.grad is not None and parameter.grad.any()
                }
            optimizer.step()

    trained = {"synapse": "", "lora": r"unet\..*\.lora_[AB]\.|", "unet": r"unet\.|"}[trainable] + r"synapse\."
    names = {f"{name}.{key}" for name, model in models.items() for key, _ in model.named_parameters()}
    expected = {name for name in names if re.match(trained, name)}
    # The keys of a layer with one token have no gradient: softmax over one score is constant.
    assert reached <= expected and len(expected - reached) <= 0.25 * len(expected)
    assert {"synapse.alphas", "synapse.value_projections.0.weight"} <= reached
    changed = {True: [], False: []}
    for name, model in models.items():
        for key, value in model.state_dict().items():
            changed[f"{name}.{key}" in expected].append(not torch.equal(value, before[name][key]))
    assert sum(changed[True]) > 0.7 * len(changed[True]) and not any(changed[False])


def test_only_what_is_trained_is_registered(training_pipe):
    assert {name.split(".")[1] for name, _ in make_objective(training_pipe).named_parameters()} == {"synapse"}
    names = {name.split(".")[1] for name, _ in make_objective(training_pipe, trainable="unet").named_parameters()}
    assert names == {"synapse", "unet"}


def test_of_a_lora_only_its_halves_are_registered_in_float32_and_there_must_be_one(training_pipe):
    with pytest.raises(ValueError, match=r"There is no LoRA to train: call `adapters_melfusion.add_lora"):
        freeze(training_pipe, "lora")
    add_lora(training_pipe.unet, rank=2)
    freeze(training_pipe, "lora", torch.bfloat16)
    objective = MelFusionObjective(training_pipe, "lora")
    assert {name.split(".")[1] for name, _ in objective.named_parameters()} == {"synapse", "lora"}
    assert {parameter.dtype for parameter in objective.parameters()} == {torch.float32}
    assert training_pipe.unet.dtype == torch.bfloat16
    lora = [name for name, parameter in training_pipe.unet.named_parameters() if parameter.requires_grad]
    assert len(lora) == len(list(objective.trained["lora"].parameters())) and all(".lora_" in name for name in lora)


def test_freezing_casts_what_is_frozen_and_keeps_what_is_trained_in_float32(training_pipe, batch):
    freeze(training_pipe, "synapse", torch.bfloat16)
    assert training_pipe.unet.dtype == training_pipe.image_unet.dtype == torch.bfloat16
    assert training_pipe.synapse.dtype == torch.float32 and training_pipe.synapse.training
    objective = MelFusionObjective(training_pipe).train()
    with objective.attached():
        objective(batch, 0).backward()
    assert torch.isfinite(training_pipe.synapse.alphas.grad).all() and training_pipe.synapse.alphas.grad.any()
    with pytest.raises(ValueError, match="`trainable` must be one of"):
        freeze(training_pipe, "vae")


@pytest.mark.parametrize("name", ["image_vae", "image_unet", "synapse"])
def test_a_pipeline_without_what_training_needs_is_refused_by_name(training_pipe, name):
    setattr(training_pipe, name, None)
    with pytest.raises(ValueError, match=f"Training needs `{name}`"):
        freeze(training_pipe, "synapse")


def test_a_picture_without_text_is_trained_on_as_it_is_played(training_pipe, batch, tmp_path):
    training_pipe.image_text_encoder = training_pipe.image_tokenizer = None
    objective = make_objective(training_pipe, tmp_path)
    with objective.attached():
        objective(batch, 0).backward()
    assert training_pipe.synapse.alphas.grad.any()


def test_gradient_checkpointing_changes_no_gradient(training_pipe, batch, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            training_pipe.unet.enable_gradient_checkpointing()
        objective = make_objective(training_pipe, tmp_path, trainable="unet")
        objective.zero_grad()
        with objective.attached():
            objective(batch, 3).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in objective.named_parameters()})
    assert training_pipe.unet.is_gradient_checkpointing
    # Together: the gradients of some parameters are zero but for rounding.
    assert_near(*(torch.cat([each.flatten() for each in computed.values()]) for computed in reversed(gradients)))


@pytest.mark.parametrize("source", ["inversion", "noising"])
def test_a_rows_loss_depends_on_seed_step_and_row_alone(training_pipe, batch, tmp_path, source):
    folder = tmp_path if source == "inversion" else None
    objective = make_objective(training_pipe, folder, text_dropout=0.5, image_dropout=0.5)
    with torch.no_grad(), objective.attached():
        together = objective.per_sample_loss(batch, 7)
        for index in range(4):
            alone = objective.per_sample_loss(rows(batch, slice(index, index + 1)), 7)
            assert_near(alone, together[index : index + 1])
        assert_near(objective(batch, 7), together.mean())
        assert not torch.allclose(objective.per_sample_loss(batch, 8), together)
    again = objective.draw(batch["indices"], 7)
    assert torch.equal(again.timesteps, objective.draw(batch["indices"], 7).timesteps)


def test_a_lightweight_vae_serves_training_too(training_pipe, batch):
    size = {"encoder_block_out_channels": (8,) * 3, "num_encoder_blocks": (1,) * 3}
    training_pipe.image_vae = AutoencoderTiny(**size, decoder_block_out_channels=(8,) * 3, num_decoder_blocks=(1,) * 3)
    objective = make_objective(training_pipe)
    latents, _ = objective._image_latents(batch, objective.draw(batch["indices"], 0))
    assert latents.shape == (4, 4, 8, 8) and latents.isfinite().all()


def test_dropping_has_its_probability_and_is_independent(training_pipe):
    objective = make_objective(training_pipe, text_dropout=0.1, image_dropout=0.3)
    draw = objective.draw(torch.arange(4000), 0)
    text, image = 1 - draw.keeps_text.float(), 1 - draw.keeps_image.float()
    assert abs(text.mean() - 0.1) < 0.02 and abs(image.mean() - 0.3) < 0.03
    assert abs((text * image).mean() - 0.03) < 0.01
    assert draw.timesteps.min() == 0 and draw.timesteps.max() >= 995
    draw = objective.eval().draw(torch.arange(100), 0)
    assert draw.keeps_text.all() and draw.keeps_image.all()


def test_timesteps_are_drawn_evenly_or_from_a_logit_normal_density(training_pipe):
    even, high = (make_objective(training_pipe, logit_mean=mean) for mean in (None, 1.0))
    indices = torch.arange(4000)
    timesteps = {name: each.draw(indices, 0).timesteps.double() for name, each in (("even", even), ("high", high))}
    assert all(0 <= each.min() and each.max() <= 999 for each in timesteps.values())
    assert timesteps["even"].mean() == pytest.approx(499.5, abs=15)
    logits = ((timesteps["high"] + 0.5) / 1000).logit()
    assert logits.mean() == pytest.approx(1.0, abs=0.06) and logits.std() == pytest.approx(1.0, abs=0.06)
    # Validation stays comparable.
    assert torch.equal(high.eval().draw(indices, 0).timesteps, even.eval().draw(indices, 0).timesteps)


def test_a_frozen_text_encoder_runs_once_for_each_text(training_pipe, batch, tmp_path):
    runs = []
    training_pipe.text_encoder.register_forward_pre_hook(lambda *_: runs.append("music"))
    training_pipe.image_text_encoder.register_forward_pre_hook(lambda *_: runs.append("picture"))
    objective = make_objective(training_pipe, text_dropout=0.0)
    with objective.attached(), torch.no_grad():
        losses = [objective(batch, 0) for _ in range(3)]
    assert sorted(runs) == ["music"] * 4 + ["picture"] and len({loss.item() for loss in losses}) == 1


def test_a_dropped_picture_is_alpha_zero_and_a_dropped_text_is_empty(training_pipe, batch):
    with torch.no_grad():
        dropped = make_objective(training_pipe, image_dropout=1.0, text_dropout=0.0)
        with dropped.attached():
            without = dropped.per_sample_loss(batch, 0)
        texts = make_objective(training_pipe, image_dropout=0.0, text_dropout=1.0)
        with texts.attached():
            no_text = texts.per_sample_loss(batch, 0)
        plain = make_objective(training_pipe, image_dropout=0.0, text_dropout=0.0)
        with plain.attached():
            assert_near(plain.per_sample_loss({**batch, "captions": [""] * 4}, 0), no_text)
            assert (plain.per_sample_loss(batch, 0) - without).abs().max() > 1e-5
            training_pipe.synapse.reset_parameters()
            assert_near(plain.per_sample_loss(batch, 0), without)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_papers(training_pipe, batch, prediction_type, snr_gamma):
    """Algorithm 1 written out, at alpha = 0, where the UNet alone predicts."""
    pipe = training_pipe
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction_type)
    pipe.synapse.reset_parameters()
    objective = make_objective(pipe, snr_gamma=snr_gamma).eval()
    with torch.no_grad(), objective.attached():
        losses = objective.per_sample_loss(batch, 2)
        draw = objective.draw(batch["indices"], 2)
        for index, t in enumerate(draw.timesteps.tolist()):
            waveform = batch["waveforms"][index : index + 1]
            own = [draw.generators[index]]
            latents = waveform_to_latents(waveform[:, None], 16000, pipe.vae, sample_mode="sample", generator=own)
            noise = torch.randn(latents.shape, generator=own[0])
            abar = pipe.scheduler.alphas_cumprod[t]
            noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
            embeds, _ = pipe.encode_prompt(batch["captions"][index], do_classifier_free_guidance=False)
            target = noise if prediction_type == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * latents
            objective.blenders.read(first_picture(objective.blenders), torch.zeros(len(objective.blenders), 1))
            error = (pipe.unet(noisy, t, None, class_labels=embeds).sample - target).square().mean()
            snr = abar / (1 - abar)
            weight = 1.0 if snr_gamma is None else min(snr, torch.tensor(5.0)) / snr
            if snr_gamma is not None and prediction_type == "v_prediction":
                weight = min(snr, torch.tensor(5.0)) / (snr + 1)
            assert_near(losses[index], weight * error)


def first_picture(blenders) -> dict:
    """What the blenders hold, for one picture."""
    return {layer: (processor.key[:1], processor.value[:1]) for layer, processor in blenders.items()}


def test_outside_of_attached_the_objective_refuses(training_pipe, batch):
    objective = make_objective(training_pipe)
    with pytest.raises(RuntimeError, match="attached"):
        objective(batch, 0)
    originals = dict(training_pipe.unet.attn_processors)
    with objective.attached():
        objective(batch, 0)
    assert training_pipe.unet.attn_processors == originals


# ---------------------------------------- two processes


def test_caches_serve_training_in_mixed_precision(training_pipe, batch, tmp_path):
    losses = []
    for enabled in (False, True):
        objective = make_objective(training_pipe, tmp_path)
        objective.music_latents = MusicLatentCache(tmp_path / "music", training_pipe.vae)
        with objective.attached(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(objective(batch, 0))
    losses[1].backward()
    assert training_pipe.synapse.alphas.grad.isfinite().all() and training_pipe.synapse.alphas.grad.any()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


def distributed_gradients(rank: int, folder, queue) -> None:
    start_anew()
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    pipe = MelFusionPipeline(**untrained_components(mel_bands=64, latent_frames=16))
    objective = make_objective(pipe, trainable="unet")
    batch = rows(make_batch(folder / str(rank), 4), slice(rank * 2, rank * 2 + 2))
    model = DistributedDataParallel(objective)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with objective.attached():
        for step in range(5):
            optimizer.zero_grad()
            model(batch, step).backward()
            if step == 0:
                gradient = torch.cat([parameter.grad.flatten() for parameter in objective.parameters()]).numpy()
            optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in objective.parameters()]).numpy()
    queue.put((rank, gradient, weights))
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_with_twice_the_batch(training_pipe, batch, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    processes = [context.Process(target=distributed_gradients, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted([queue.get(timeout=300) for _ in processes], key=lambda result: result[0])
    for process in processes:
        process.join()
    (_, gradient, weights), (_, other_gradient, other_weights) = results
    assert np.array_equal(weights, other_weights) and np.array_equal(gradient, other_gradient)

    objective = make_objective(training_pipe, trainable="unet")
    with objective.attached():
        objective(batch, 0).backward()
    single = torch.cat([parameter.grad.flatten() for parameter in objective.parameters()]).numpy()
    assert np.abs(single).max() > 1e-3
    assert_near(gradient, single)
