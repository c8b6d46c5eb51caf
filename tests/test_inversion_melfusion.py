import weakref
from pathlib import Path

import pytest
import torch
from conftest import assert_near
from diffusers import DDIMScheduler, PNDMScheduler
from untrained import picture_unet

from melfusion_pipeline import ImageFeatures
from melfusion_pipeline.features_melfusion import FEATURE_SOURCES
from melfusion_pipeline.inversion_melfusion import (
    ddim_step,
    ddim_walk,
    inversion_grid,
    record_image_features,
    record_keys_and_values,
)
from melfusion_pipeline.modeling_melfusion import decoder_layers


def image_scheduler(prediction_type: str = "epsilon", **changes) -> DDIMScheduler:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    return DDIMScheduler(**{**config, "prediction_type": prediction_type, **changes})


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 50, 61, 122, 999, 1000])
def test_the_grid_is_trailing_and_starts_at_the_final_alpha(steps: int):
    scheduler = image_scheduler()
    levels = inversion_grid(scheduler, steps)
    assert len(levels) == steps + 1 and levels[0] == (0, float(scheduler.final_alpha_cumprod))
    expected = [round(1000 * index / steps) - 1 for index in range(1, steps + 1)]
    assert [level.timestep for level in levels[1:]] == pytest.approx(expected, abs=1)
    assert levels[-1].timestep == 999 and all(a.timestep <= b.timestep for a, b in zip(levels, levels[1:]))
    for level in levels[1:]:
        assert level.alpha_cumprod == float(scheduler.alphas_cumprod[level.timestep])
    if steps == 10:
        assert [level.timestep for level in levels] == [0, *range(99, 1000, 100)]


def test_the_grid_reads_any_scheduler_and_its_final_alpha():
    assert inversion_grid(image_scheduler(set_alpha_to_one=True), 4)[0].alpha_cumprod == 1.0
    config = image_scheduler().config
    assert inversion_grid(PNDMScheduler.from_config(config), 10) == inversion_grid(image_scheduler(), 10)


class Oracle(torch.nn.Module):
    """A known model output in place of a UNet: what the recursion is checked with must not be the thing itself."""

    dtype = torch.float64

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, latents, timestep, encoder_hidden_states):
        self.calls.append((int(timestep), latents))
        output = type("Output", (), {})()
        output.sample = self.function(latents, int(timestep))
        return output


@pytest.mark.parametrize("steps", [3, 7, 10])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_equals_the_closed_form_step_by_step(prediction_type: str, steps: int):
    torch.manual_seed(0)
    scheduler = image_scheduler(prediction_type)
    mixing = torch.randn(4, 4, dtype=torch.float64)
    model = Oracle(lambda z, t: torch.tanh(torch.einsum("ij,bjhw->bihw", mixing, z)) * (0.3 + t / 2000))
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    levels = inversion_grid(scheduler, steps)

    alphas = [float(scheduler.final_alpha_cumprod)]
    alphas += [float(scheduler.alphas_cumprod[level.timestep]) for level in levels[1:]]
    times = [level.timestep for level in levels]
    z = latents
    walked = list(ddim_walk(model, latents, torch.zeros(2, 1, 8), levels, prediction_type))
    for index in range(steps):
        output = model.function(z, times[index])
        a, b = alphas[index], alphas[index + 1]
        eps = output if prediction_type == "epsilon" else a**0.5 * output + (1 - a) ** 0.5 * z
        x0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
        z = b**0.5 * x0 + (1 - b) ** 0.5 * eps
        level, reached = walked[index]
        assert level.timestep == times[index + 1]
        assert_near(reached, z)
        assert model.calls[index][0] == times[index]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_with_a_constant_eps_the_round_trip_is_exact(steps: int):
    torch.manual_seed(0)
    eps = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    model = Oracle(lambda z, t: eps)
    levels = inversion_grid(image_scheduler(), steps)
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    *_, (_, inverted) = ddim_walk(model, latents, None, levels, "epsilon")
    *_, (_, restored) = ddim_walk(model, inverted, None, levels[::-1], "epsilon")
    assert (inverted - latents).abs().max() > 0.1
    assert_near(restored, latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_round_trip_improves_with_the_number_of_steps(prediction_type: str, capsys):
    torch.manual_seed(0)
    unet = picture_unet().eval()
    latents, prompt_embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    errors = []
    for steps in (4, 8, 16, 32):
        levels = inversion_grid(image_scheduler(prediction_type), steps)
        with torch.no_grad():
            *_, (_, inverted) = ddim_walk(unet, latents, prompt_embeds, levels, prediction_type)
            *_, (_, restored) = ddim_walk(unet, inverted, prompt_embeds, levels[::-1], prediction_type)
        errors.append((restored - latents).square().mean().sqrt().item())
    with capsys.disabled():
        print(f"\nround trip, {prediction_type}, 4/8/16/32 steps:", [f"{error:.4f}" for error in errors])
    assert all(later < earlier for earlier, later in zip(errors, errors[1:])) and errors[-1] < errors[0] / 2


@pytest.mark.parametrize("steps", [3, 9])
def test_a_noised_picture_is_recorded_in_as_few_passes_as_fit(steps: int):
    """With nine steps and two pictures in two, of which the second is not full."""
    unet, scheduler = picture_unet().eval(), image_scheduler("epsilon")
    torch.manual_seed(0)
    latents, prompt_embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    layers = [name for name, _, _ in decoder_layers(unet, "attn1")]
    sizes = []
    hook = unet.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    arguments = (unet, scheduler, latents, prompt_embeds, layers, steps, "noising")
    with torch.no_grad():
        features, again = record_image_features(*arguments), record_image_features(*arguments)
        assert sizes == [6, 6] if steps == 3 else [16, 2, 16, 2]
        hook.remove()
        assert features.feature_source == "noising" and features.num_images == 2
        assert features.timesteps.tolist() == [level.timestep for level in inversion_grid(scheduler, steps)[:-1]]
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
        for step, t in enumerate(features.timesteps.tolist()):
            abar = scheduler.alphas_cumprod[t]
            noised = abar.sqrt() * latents + (1 - abar).sqrt() * noise
            keys, values = record_keys_and_values(unet, noised, torch.tensor([t, t]), prompt_embeds, layers)
            for layer in layers:
                assert_near(features.keys[layer][step], keys[layer])
                assert_near(features.values[layer][step], values[layer])
                assert torch.equal(features.keys[layer], again.keys[layer])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("feature_source", ["inversion", "reconstruction"])
def test_recorded_features_equal_a_textbook_loop(feature_source: str, prediction_type: str):
    torch.manual_seed(0)
    unet, scheduler, steps = picture_unet().eval(), image_scheduler(prediction_type), 4
    latents, prompt_embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    layers = [name for name, _, _ in decoder_layers(unet, "attn1")]
    originals = dict(unet.attn_processors)
    with torch.no_grad():
        features = record_image_features(
            unet, scheduler, latents, prompt_embeds, layers, steps, feature_source=feature_source
        )
    assert all(unet.attn_processors[name] is processor for name, processor in originals.items())

    times = [0, 249, 499, 749, 999]
    abar = [scheduler.final_alpha_cumprod] + [scheduler.alphas_cumprod[t] for t in times[1:]]
    passes, seen = [], {}
    for layer in layers:
        for side in ("to_k", "to_v"):
            module = unet.get_submodule(f"{layer}.{side}")
            module.register_forward_hook(lambda _, __, output, at=(layer, side): seen.update({at: output}))

    def step(z, source, target):
        output = unet(z, times[source], prompt_embeds).sample
        passes.append((times[source], dict(seen)))
        a, b = abar[source], abar[target]
        eps = output if prediction_type == "epsilon" else a**0.5 * output + (1 - a) ** 0.5 * z
        return b**0.5 * (z - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps

    z = latents
    with torch.no_grad():
        for index in range(steps):
            z = step(z, index, index + 1)
        if feature_source == "reconstruction":
            passes.clear()
            for index in range(steps, 0, -1):
                z = step(z, index, index - 1)
    assert features.timesteps.tolist() == [time for time, _ in passes]
    for recorded, (_, expected) in enumerate(passes):
        for layer in layers:
            assert_near(features.keys[layer][recorded], expected[layer, "to_k"])
            assert_near(features.values[layer][recorded], expected[layer, "to_v"])


@torch.no_grad()
@pytest.mark.parametrize("feature_source", FEATURE_SOURCES)
def test_another_default_device_changes_nothing(feature_source: str, monkeypatch: pytest.MonkeyPatch):
    unet, scheduler = picture_unet().eval(), image_scheduler("epsilon")
    layers = [name for name, _, _ in decoder_layers(unet, "attn1")]
    arguments = (unet, scheduler, torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), layers, 2, feature_source)
    expected = record_image_features(*arguments)
    # diffusers makes a scheduler's tensors on the default device, and brings them to the latents when it uses them.
    ready = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    monkeypatch.setattr(DDIMScheduler, "from_config", lambda *arguments, **options: ready)
    with torch.device("meta"):
        features = record_image_features(*arguments)
    assert all(torch.equal(features.keys[layer], expected.keys[layer]) for layer in layers)


def test_a_batch_of_pictures_equals_its_pictures():
    torch.manual_seed(0)
    unet, layers = picture_unet().eval(), []
    layers = [name for name, _, _ in decoder_layers(unet, "attn1")]
    latents, prompt_embeds = torch.randn(3, 4, 8, 8), torch.randn(1, 5, 24).expand(3, -1, -1)
    with torch.no_grad():
        together = record_image_features(unet, image_scheduler(), latents, prompt_embeds, layers, 3)
        alone = record_image_features(unet, image_scheduler(), latents[1:2], prompt_embeds[:1], layers, 3)
    assert together.num_images == 3 and alone.num_images == 1
    for layer in layers:
        assert_near(together.keys[layer][:, 1:2], alone.keys[layer])


class Replay(torch.nn.Module):
    """Runs a UNet as CUDA graphs do: what it returned or recorded is overwritten by its next pass."""

    def __init__(self, unet, recorded):
        super().__init__()
        self.unet, self.dtype, self.recorded, self.static = unet, unet.dtype, recorded, {}

    def get_submodule(self, name):
        return self.unet.get_submodule(name)

    def keep(self, name, tensor):
        return self.static.setdefault(name, torch.empty_like(tensor)).copy_(tensor)

    def forward(self, *args, **kwargs):
        output = self.unet(*args, **kwargs)
        output.sample = self.keep("sample", output.sample)
        for layer in self.recorded:
            processor = self.unet.get_submodule(layer).processor
            processor.key = self.keep((layer, "key"), processor.key)
            processor.value = self.keep((layer, "value"), processor.value)
        return output


def test_recordings_survive_a_unet_that_overwrites_its_outputs():
    torch.manual_seed(0)
    unet = picture_unet().eval()
    layers = [name for name, _, _ in decoder_layers(unet, "attn1")]
    inputs = (image_scheduler(), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), layers, 4)
    with torch.no_grad():
        expected = record_image_features(unet, *inputs)
        recorded = record_image_features(Replay(unet, layers), *inputs)
    for layer in layers:
        assert torch.equal(recorded.keys[layer], expected.keys[layer])
        assert torch.equal(recorded.values[layer], expected.values[layer])
        assert not torch.equal(expected.keys[layer][0], expected.keys[layer][1])


@pytest.mark.parametrize(
    ("feature_source", "read_at", "kept", "rows"),
    [
        ("inversion", [260.0, 30.0, 240.0], [0, 2], 3),
        ("inversion", [990.0], [7], 8),
        ("reconstruction", [870.0, 900.0], [1], 8 + 2),
        ("noising", [260.0, 30.0, 240.0], [0, 2], 2),
    ],
)
def test_only_steps_that_are_read_are_kept_and_only_what_these_need_is_made(feature_source, read_at, kept, rows):
    torch.manual_seed(0)
    unet, made = picture_unet().eval(), []
    layers = [name for name, _, _ in decoder_layers(unet, "attn1")]
    arguments = (unet, image_scheduler(), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), layers, 8, feature_source)
    with torch.no_grad():
        whole = record_image_features(*arguments)
        unet.register_forward_pre_hook(lambda _, args: made.append(len(args[0])))
        part = record_image_features(*arguments, read_at=torch.tensor(read_at))
    assert sum(made) == rows and torch.equal(part.timesteps, whole.timesteps[kept])
    read = whole.nearest(torch.tensor(read_at)).tolist()
    for found, step in zip(part.nearest(torch.tensor(read_at)).tolist(), read, strict=True):
        for layer, pair in whole.at_step(step).items():
            for states, expected in zip(part.at_step(found)[layer], pair, strict=True):
                assert_near(states, expected, steps=0 if feature_source != "noising" else 1000)


# -------------------------------------------------------------------------------------------------- features


def some_features(steps: int = 3) -> ImageFeatures:
    torch.manual_seed(0)
    keys, values = ({name: torch.randn(steps, 2, 5, 4) for name in ("a.attn1", "b.attn1")} for _ in range(2))
    return ImageFeatures(keys, values, torch.tensor([0, 333, 666][:steps]), "inversion", 32)


@pytest.mark.parametrize(("timestep", "step"), [(0, 0), (160, 0), (170, 1), (999, 2), (666.4, 2), (-5, 0)])
def test_at_gives_the_nearest_recorded_timestep(timestep: float, step: int):
    features = some_features()
    for t in (timestep, torch.tensor(timestep)):
        key, value = features.at(t)["b.attn1"]
        assert torch.equal(key, features.keys["b.attn1"][step])
        assert torch.equal(value, features.values["b.attn1"][step])


def test_a_table_of_recorded_steps_gives_what_each_lookup_gives():
    features = some_features()
    timesteps = torch.tensor([999.0, 170.0, 166.5, 160.0, -5.0])
    steps = features.nearest(timesteps)
    assert steps.tolist() == [2, 1, 0, 0, 0] and steps.dtype == torch.long
    for timestep, step in zip(timesteps, steps.tolist()):
        for one, other in zip(features.at(timestep).values(), features.at_step(step).values()):
            assert all(map(torch.equal, one, other))
    with pytest.raises(ValueError, match="finite"):
        features.nearest(torch.tensor([0.0, float("nan")]))
    with pytest.raises(TypeError, match="tensor of numbers"):
        features.nearest([0, 1])
    with pytest.raises(IndexError):
        features.at_step(3)
    for step in (0, 2, -1):
        part = features.select(step)
        assert part.timesteps.tolist() == [features.timesteps[step]] and part.image_size == features.image_size
        for layer, pair in features.at_step(step).items():
            assert all(map(torch.equal, part.at_step(0)[layer], pair))
            assert part.keys[layer].untyped_storage().data_ptr() == features.keys[layer].untyped_storage().data_ptr()
    with pytest.raises(IndexError):
        features.select(3)


def test_features_are_equal_to_themselves_only():
    features, same = some_features(), some_features()
    assert features == features and features != same and len({features, features, same}) == 2


def test_joining_holds_one_layer_twice_at_most(monkeypatch: pytest.MonkeyPatch):
    held, alive, cat = [], [], torch.cat

    def parts():
        for _ in range(3):
            part = some_features()
            held.extend(weakref.ref(tensor) for side in (part.keys, part.values) for tensor in side.values())
            yield part

    def count(tensors, dim):
        alive.append(sum(tensor() is not None for tensor in held))
        return cat(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", count)
    joined = ImageFeatures.join(parts())
    assert joined.num_images == 3 * some_features().num_images
    assert alive == list(range(len(held), 0, -3))


def test_features_move_and_survive_the_disk(tmp_path: Path):
    features = some_features().to(torch.float16)
    assert features.keys["a.attn1"].dtype == torch.float16
    assert features.nbytes == 4 * 3 * 2 * 5 * 4 * 2
    features.save(tmp_path / "picture.safetensors")
    loaded = ImageFeatures.load(tmp_path / "picture.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.safetensors"]
    assert loaded.feature_source == "inversion" and loaded.image_size == 32
    assert torch.equal(loaded.timesteps, features.timesteps)
    for layer in features.keys:
        assert torch.equal(loaded.keys[layer], features.keys[layer])
        assert torch.equal(loaded.values[layer], features.values[layer])


def test_damaged_feature_files_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "picture.safetensors"
    some_features().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="picture.safetensors is no complete file"):
        ImageFeatures.load(path)


def test_inconsistent_features_are_refused():
    features = some_features()
    with pytest.raises(ValueError, match="same layers"):
        ImageFeatures(features.keys, {}, features.timesteps)
    with pytest.raises(ValueError, match="steps=2"):
        ImageFeatures(features.keys, features.values, features.timesteps[:2])


def test_ddim_step_ends_where_it_began_for_equal_levels():
    latents, output = torch.randn(2, 1, 4, 4, 4)
    for prediction_type in ("epsilon", "v_prediction"):
        assert_near(ddim_step(output, latents, 0.3, 0.3, prediction_type), latents)
