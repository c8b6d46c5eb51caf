"""What never changes in training, computed once: trajectories and features of pictures, encodings of clips."""

import pickle
import shutil

import pytest
import torch
from conftest import assert_near, photograph
from test_training import STEPS, batch, make_objective, training_pipe  # noqa: F401 - two are fixtures

from melfusion_pipeline.audio import waveform_to_latents
from melfusion_pipeline.caches import ImageFeaturesCache, MusicLatentCache, TrajectoryCache
from melfusion_pipeline.data import collate_triplets
from melfusion_pipeline.inversion_melfusion import record_keys_and_values


def test_trajectories_are_the_latents_at_which_the_pipeline_records(training_pipe, batch, tmp_path):  # noqa: F811
    pipe = training_pipe
    cache = TrajectoryCache(tmp_path / "cache", pipe, STEPS, 32)
    assert cache.timesteps.tolist() == [0, 332, 666]
    features = pipe.encode_image(photograph(0, 40, 36), num_inversion_steps=STEPS, image_size=32)
    assert features.timesteps.tolist() == cache.timesteps.tolist()
    latents, timesteps = cache.read(batch["image_files"][:1] * 3, torch.tensor([10, 350, 999]))
    assert timesteps.tolist() == [0, 332, 666]
    layer = pipe.synapse.config.image_layers[0]
    objective = make_objective(pipe, tmp_path)
    recorded, _ = record(pipe, latents, timesteps)
    # The cache is float16.
    assert_near(recorded[layer].half(), features.keys[layer][:, 0].half(), steps=10)
    assert objective.trajectories.missing(batch["image_files"][:1]) == []


def record(pipe, latents, timesteps):
    prompt_embeds = pipe.encode_image_prompt("", len(latents))
    with torch.no_grad():
        return record_keys_and_values(
            pipe.image_unet, latents, timesteps, prompt_embeds, pipe.synapse.config.image_layers
        )


def test_the_cache_is_keyed_by_content_settings_and_models_and_is_resumable(training_pipe, batch, tmp_path):  # noqa: F811
    pipe, paths = training_pipe, batch["image_files"]
    cache = TrajectoryCache(tmp_path / "cache", pipe, STEPS, 32)
    assert cache.missing(paths) == [0, 1, 2, 3]
    cache.build(paths, batch_size=3, process_index=0, num_processes=2)
    assert cache.missing(paths) == [1, 3]
    # A process that begins when another is done has its own half to do all the same.
    cache.build(paths, process_index=1, num_processes=2)
    assert cache.missing(paths) == []
    files = sorted(cache.files.folder.iterdir())
    assert len(files) == 4 and {file.suffix for file in files} == {".safetensors"}
    payload = sum(file.stat().st_size for file in files)
    assert cache.nbytes(4) == 4 * STEPS * 4 * 8 * 8 * 2 and payload - cache.nbytes(4) < 4 * 200

    stamps = [file.stat().st_mtime_ns for file in files]
    again = TrajectoryCache(tmp_path / "cache", pipe, STEPS, 32)
    again.build(paths)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    photograph(0, 40, 36).save(tmp_path / "copy.png")
    assert again.missing([str(tmp_path / "copy.png")]) == []
    assert TrajectoryCache(tmp_path / "cache", pipe, STEPS + 1, 32).missing(paths) == [0, 1, 2, 3]
    assert TrajectoryCache(tmp_path / "cache", pipe, STEPS, 48).missing(paths) == [0, 1, 2, 3]
    with torch.no_grad():
        pipe.image_unet.conv_in.bias[0] += 1e-3
    assert TrajectoryCache(tmp_path / "cache", pipe, STEPS, 32).missing(paths) == [0, 1, 2, 3]


def test_a_clip_is_encoded_once_and_its_latents_are_those_of_the_front_end(training_pipe, batch, tmp_path):  # noqa: F811
    encoded = []
    training_pipe.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    draw = make_objective(training_pipe).draw(batch["indices"], 0)
    expected = waveform_to_latents(
        batch["waveforms"][:, None], 16000, training_pipe.vae, sample_mode="sample", generator=draw.generators
    )
    encoded.clear()
    for _ in range(2):
        generators = make_objective(training_pipe).draw(batch["indices"], 0).generators
        cache = MusicLatentCache(tmp_path / "music", training_pipe.vae)
        latents = cache.encode(batch["waveforms"], generators)
        # The cache is float16.
        assert_near(latents.half(), expected.half(), steps=2)
    assert len(encoded) == len(batch["waveforms"]) == len(list((tmp_path / "music").iterdir()))

    with torch.no_grad():
        training_pipe.vae.encoder.conv_in.weight.mul_(1.5)
    MusicLatentCache(tmp_path / "music", training_pipe.vae).encode(batch["waveforms"], generators)
    assert len(encoded) == 2 * len(batch["waveforms"]), "other weights need other encodings"


def test_the_objective_reads_the_clips_from_their_cache(training_pipe, batch, tmp_path):  # noqa: F811
    fresh, cached = make_objective(training_pipe), make_objective(training_pipe)
    cached.music_latents = MusicLatentCache(tmp_path / "music", training_pipe.vae)
    with fresh.attached():
        expected = fresh.per_sample_loss(batch, 3)
    with cached.attached():
        assert_near(cached.per_sample_loss(batch, 3).half(), expected.half(), steps=10)
    assert len(list((tmp_path / "music").iterdir())) == len(batch["waveforms"])


def test_with_cached_features_training_needs_no_model_of_the_picture(training_pipe, batch, tmp_path):  # noqa: F811
    """The losses are those with trajectories, but for features and trajectories being float16."""
    pipe, files = training_pipe, batch["image_files"]
    objective = make_objective(pipe, tmp_path)
    with torch.no_grad(), objective.attached():
        pipe.synapse.alphas.fill_(0.5)
        expected = objective.per_sample_loss(batch, 3)
        without = objective.per_sample_loss(batch, 3, synapse_scale=0.0)
    cache = ImageFeaturesCache(tmp_path / "features", pipe, STEPS, 32)
    assert cache.missing(files) == [0, 1, 2, 3]
    cache.build(files, batch_size=3)
    size = sum(file.stat().st_size for file in cache.files.folder.iterdir())
    assert cache.missing(files) == [] and 0 < size - cache.nbytes(4) < 4 * 2000
    features = pipe.encode_image(photograph(1, 40, 36), num_inversion_steps=STEPS, image_size=32)
    kept = cache.features(files[1])
    assert kept.timesteps.tolist() == features.timesteps.tolist() and kept.image_size == 32
    for layer, keys in features.keys.items():
        assert_near(kept.keys[layer], keys.half(), steps=10)
    pipe.register_modules(image_vae=None, image_text_encoder=None, image_unet=None)
    objective.trajectories, objective.image_features = None, cache
    with torch.no_grad(), objective.attached():
        losses = objective.per_sample_loss(batch, 3)
    assert_near(losses.half(), expected.half(), steps=2)
    assert (without - expected).abs().max() > 10 * (losses - expected).abs().max()
    photograph(9, 40, 36).save(tmp_path / "new.png")
    with pytest.raises(FileNotFoundError):
        cache.read([str(tmp_path / "new.png")], torch.tensor([0]))


def test_what_a_worker_has_prepared_is_not_read_again(training_pipe, batch, tmp_path):  # noqa: F811
    """A worker is sent no model; folders and clips are gone when the batch comes, and the losses are the same."""
    samples = [{name: values[index] for name, values in batch.items()} for index in range(4)]
    objective = make_objective(training_pipe, tmp_path)
    for name in ("moments", "mels"):
        if name == "moments":
            objective.music_latents = MusicLatentCache(tmp_path / "music", training_pipe.vae)
        with torch.no_grad(), objective.attached():
            expected = objective.per_sample_loss(batch, 3)
            sent = pickle.dumps(objective.prepared_inputs())
            assert len(sent) < 10_000
            prepared = [pickle.loads(sent)(sample) for sample in samples]
            loaded = collate_triplets(prepared)
            assert loaded.keys() - batch.keys() == {"trajectories", name} and len(loaded["trajectories"][0]) == STEPS
            assert collate_triplets([samples[0], *prepared[1:]]).keys() == batch.keys()
            shutil.rmtree(objective.trajectories.files.folder)
            assert_near(objective.per_sample_loss(loaded | {"waveforms": batch["waveforms"] * torch.nan}, 3), expected)
            objective.trajectories.files.folder.mkdir()
            objective.music_latents = None
