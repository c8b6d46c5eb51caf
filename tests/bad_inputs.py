"""Bad inputs of every kind and what must become of them: an error with a named cause, and nothing left behind.

`python tests/bad_inputs.py` prints the table of every input tried. Most of them hypothesis draws, from fixed seeds.
"""

import contextlib
import functools
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import soundfile
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]

from copies import untrained_components  # noqa: E402
from films import write_film  # noqa: E402

from melfusion_pipeline import ImageFeatures, MelFusionPipeline, film, metrics, onsets, plotting, scoring  # noqa: E402
from melfusion_pipeline.adapters_melfusion import add_lora  # noqa: E402
from melfusion_pipeline.audio import (  # noqa: E402
    Spectrogram,
    audio_duration,
    encode_mel,
    load_audio,
    load_random_crop,
    resample,
    save_audio,
    waveform_to_latents,
)
from melfusion_pipeline.caches import TrajectoryCache  # noqa: E402
from melfusion_pipeline.checks_melfusion import OUTPUT_TYPES  # noqa: E402
from melfusion_pipeline.data import check_rows, convert_musiccaps, load_rows, open_image, read_triplet  # noqa: E402
from melfusion_pipeline.features_melfusion import FEATURE_SOURCES  # noqa: E402
from melfusion_pipeline.pictures_melfusion import prepare_image  # noqa: E402
from melfusion_pipeline.streams import TripletStream  # noqa: E402
from melfusion_pipeline.training import MelFusionObjective  # noqa: E402

REFUSALS = (ValueError, TypeError, OSError)
TIME_LIMIT_IN_S = 30


class Outcome(NamedTuple):
    """One bad input and the error it ended in."""

    area: str
    what: str
    error: str
    message: str


# ------------------------------------------------------------------------------------------------------- the attempt


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def give_up(*_):
        raise AssertionError(f"it took more than {TIME_LIMIT_IN_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TIME_LIMIT_IN_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_of(folder: Path | None) -> dict[str, int]:
    """Names and sizes of everything in a folder."""
    files = folder.rglob("*") if folder else ()
    return {str(file): file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink()}


def refuse(
    area: str,
    what: str,
    action: Callable[[], Any],
    name: str,
    folder: Path | None = None,
    good: Callable | None = None,
) -> Outcome | None:
    """Runs `action`, which must end soon, in an error that names `name`, and leave `folder` as it was.

    With `good`, damage may also go unnoticed, if `good(result)` holds: not every changed byte makes a file bad.
    Any error of another type is a crash and passes through.
    """
    before = files_of(folder)
    try:
        with time_limit():
            result = action()
    except REFUSALS as error:
        message = " ".join(str(error).split())
        assert name in message, f"{area}: {what} ended in {error!r}, which does not name {name}"
        assert files_of(folder) == before, f"{area}: {what} changed the files"
        return Outcome(area, what, type(error).__name__, message)
    assert good is not None and good(result), f"{area}: {what} was accepted"
    return None


def fuzz(strategy: st.SearchStrategy, examples: int, attempt: Callable, start: int = 0) -> list[Outcome]:
    """Attempts what `strategy` draws from the seed `start`."""
    outcomes = []

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value):
        outcomes.append(attempt(value))

    draw()
    return [outcome for outcome in outcomes if outcome is not None]


def describe(value: Any) -> str:
    """A short text for a table."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        finite = "" if np.isfinite(np.asarray(value, dtype=complex)).all() else ", not finite"
        return f"{type(value).__name__} {list(value.shape)} {value.dtype}{finite}"
    if isinstance(value, list) and value and not isinstance(value[0], (int, float, str)):
        return f"[{', '.join(describe(single) for single in value)}]"
    if isinstance(value, (PIL.Image.Image, torch.Generator)):
        return f"a {type(value).__name__}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


# ------------------------------------------------------------------------------------------------------- what is drawn

HUGE = 10**400
surrogates = st.text(st.characters(categories=["Cs"]), min_size=1, max_size=3)
oddities = st.one_of(
    st.just(...),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.frozensets(st.integers(), max_size=2),
    st.dictionaries(st.integers(), st.integers(), max_size=1),
    st.tuples(st.integers()),
)
not_numbers = st.one_of(oddities, st.booleans(), st.text(max_size=4), st.lists(st.integers(), max_size=2))
not_finite = st.sampled_from([math.nan, math.inf, -math.inf, HUGE, -HUGE])
not_texts = st.one_of(
    oddities, st.integers(), st.floats(), st.just([]), st.lists(st.integers(), min_size=1), surrogates
)
shapes = st.lists(st.integers(0, 5), max_size=5)


def wrong_integers(minimum: int, maximum: int) -> st.SearchStrategy:
    outside = st.integers(-HUGE, minimum - 1) | st.integers(maximum + 1, HUGE)
    return st.one_of(outside, st.floats(), not_numbers)


def wrong_reals(minimum: float = -math.inf, maximum: float = math.inf) -> st.SearchStrategy:
    strategies = [not_finite, not_numbers]
    if math.isfinite(minimum):
        strategies += [st.floats(max_value=minimum, exclude_max=True), st.floats(maximum, exclude_min=True)]
    return st.one_of(*strategies)


def wrong_tensors(*shape: int) -> st.SearchStrategy:
    others = shapes.filter(lambda drawn: tuple(drawn) != shape).map(torch.zeros)
    kinds = [torch.full(shape, math.nan), torch.full(shape, math.inf), torch.zeros(shape, dtype=torch.complex64)]
    kinds += [torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool), np.zeros(shape)]
    return st.one_of(others, st.sampled_from(kinds), oddities, st.lists(st.floats(), max_size=3))


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether arrays of this shape are grey or coloured pictures, or a batch of them."""
    return len(shape) == 2 or (len(shape) in (3, 4) and shape[-1] in (1, 3, 4))


def wrong_pictures() -> st.SearchStrategy:
    arrays = st.tuples(shapes, st.sampled_from(["uint8", "float32", "int64", "bool", "complex64", "object"]))
    arrays = arrays.map(lambda drawn: np.zeros(*drawn))
    arrays = arrays.filter(lambda array: array.dtype not in (np.uint8, np.float32) or not is_picture(array.shape))
    levels = st.sampled_from([math.nan, math.inf, -1.0, 1.5, 255.0]).map(lambda level: np.full((4, 4, 3), level))
    channels = shapes.filter(lambda shape: len(shape) < 3 or shape[-3] not in (1, 3, 4)).map(torch.zeros)
    kinds = st.sampled_from([[], "picture.png", Path("picture.png"), PIL.Image.new("RGB", (0, 4)), [[]], [None]])
    return st.one_of(arrays, levels, channels, kinds, oddities, st.integers())


def wrong_audio() -> st.SearchStrategy:
    kinds = [
        torch.zeros(16000),
        torch.ones(1, 16000),
        GIVEN[:1],
        GIVEN[:600],
        GIVEN.int(),
        GIVEN[:, None],
        GIVEN * 1e39,
    ]
    kinds += [torch.full((16000,), math.nan), GIVEN.expand(2, 1, 16000), GIVEN[(None,) * 3], GIVEN[:0], GIVEN.tolist()]
    return st.one_of(st.sampled_from(kinds), shapes.map(torch.zeros), oddities, st.text(max_size=4))


GIVEN = torch.sin(torch.arange(16000) / 10)
ONE_GENERATOR = torch.Generator()
texts_of_other_number = st.lists(st.just("a"), min_size=2, max_size=4)
# hypothesis draws words of the source too, and some of those are right.
no_choices = st.text(max_size=6).filter(lambda text: text not in (*OUTPUT_TYPES, *FEATURE_SOURCES))
choices = st.one_of(no_choices, oddities, st.none(), st.just(np.zeros(2)), st.just(["np"]))
# For each argument of `__call__` what it must not be; `image` and `prompt` are good unless they are changed here.
BAD_ARGUMENTS = {
    "image": wrong_pictures(),
    "prompt": not_texts,
    "audio_length_in_s": wrong_reals(0.039, 3600.0),
    "num_inference_steps": wrong_integers(1, 1000),
    "num_inversion_steps": wrong_integers(1, 1000),
    "guidance_scale": wrong_reals(),
    "image_guidance_scale": wrong_reals(),
    "image_guidance_end": wrong_reals(0.0, 1.0),
    "synapse_scale": wrong_reals()
    | st.none()
    | st.lists(not_finite, min_size=6, max_size=6)
    | shapes.map(torch.zeros),
    "negative_prompt": not_texts | texts_of_other_number,
    "num_waveforms_per_prompt": wrong_integers(1, 1000) | st.none(),
    "eta": wrong_reals(0.0, 1.0) | st.none(),
    "generator": st.one_of(not_numbers, st.integers(), st.integers(2, 4).map(lambda count: [ONE_GENERATOR] * count)),
    "latents": wrong_tensors(1, 4, 8, 2),
    "prompt_embeds": wrong_tensors(1, 32),
    "negative_prompt_embeds": wrong_tensors(1, 32),
    "image_prompt": not_texts | texts_of_other_number | st.none(),
    "image_size": wrong_integers(1, 8192) | st.integers(0, 2000).map(lambda number: 4 * number + 2),
    "image_features": st.one_of(oddities, st.integers(), st.text(max_size=4), st.just(torch.zeros(2))),
    "feature_source": choices.filter(lambda value: value is not None),
    # Of the one picture; [0] is right, as a tuple and a tensor too.
    "image_start_in_s": oddities.filter(lambda value: value != (0,))
    | st.integers()
    | st.text(max_size=4)
    | st.lists(st.floats() | st.integers(), max_size=3).filter(lambda starts: starts != [0])
    | shapes.filter(lambda shape: shape != [1]).map(torch.zeros),
    "window_length_in_s": wrong_reals(0.319, 3600.0),
    "window_overlap": wrong_reals(0.0, 0.9) | st.none(),
    "window_batch_size": st.integers(max_value=0) | st.floats() | not_numbers,
    "audio": wrong_audio(),
    "audio_sampling_rate": st.integers(max_value=0) | st.floats() | not_numbers,
    "strength": wrong_reals(0.02, 1.0),
    "mask_start_in_s": wrong_reals(0.0, 0.999).filter(lambda value: value != []),
    "mask_end_in_s": wrong_reals(0.001, 1.0).filter(lambda value: value != []),
    "output_type": choices,
    "cross_attention_kwargs": st.one_of(st.integers(), st.text(max_size=4), st.lists(st.integers(), max_size=2)),
    "callback_on_step_end": st.one_of(oddities, st.integers(), st.text(max_size=4)),
    "callback_on_step_end_tensor_inputs": st.one_of(
        oddities.filter(lambda value: not isinstance(value, tuple)),
        st.none(),
        st.text(max_size=4),
        st.lists(st.text(max_size=4), min_size=1, max_size=2),
        st.lists(st.integers(), min_size=1, max_size=2),
    ),
}
WITH_AUDIO = ("audio", "audio_sampling_rate", "strength", "mask_start_in_s", "mask_end_in_s")
EXAMPLES_PER_ARGUMENT = 10


def strict_pipeline() -> MelFusionPipeline:
    """A pipeline whose models must not run: bad arguments are refused before."""

    def ran(*args, **kwargs):
        raise AssertionError("a model ran before the input was checked")

    components = untrained_components()
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.register_forward_pre_hook(ran)
    components["image_vae"].encode = components["vae"].encode = components["vae"].decode = ran
    return MelFusionPipeline(**components)


def try_arguments(folder: Path) -> list[Outcome]:
    """Every argument of `__call__` in turn."""
    pipe, outcomes = strict_pipeline(), []
    picture = PIL.Image.new("RGB", (8, 8), "red")
    for start, (argument, strategy) in enumerate(BAD_ARGUMENTS.items()):
        replaced = {"image_features": {"image": None}, "prompt_embeds": {"prompt": None}}.get(argument, {})
        if argument in WITH_AUDIO:
            replaced = {"audio": GIVEN, "audio_sampling_rate": 16000, "strength": 0.5}
        arguments = {"image": picture, "prompt": "a piano", **replaced}

        def attempt(value, argument=argument, arguments=arguments):
            call = functools.partial(pipe, **{**arguments, argument: value})
            return refuse("argument of `__call__`", f"`{argument}` = {describe(value)}", call, f"`{argument}")

        outcomes += fuzz(strategy, EXAMPLES_PER_ARGUMENT, attempt, start)
    return outcomes


# ------------------------------------------------------------------------------------------------------- features


def some_features(**changes: Any) -> ImageFeatures:
    keys, values = ({name: torch.randn(3, 1, 5, 4) for name in ("a.attn1", "b.attn1")} for _ in range(2))
    return ImageFeatures(**{"keys": keys, "values": values, "timesteps": torch.tensor([0, 333, 666]), **changes})


def try_features(folder: Path) -> list[Outcome]:
    """`ImageFeatures` made, read and moved with wrong values."""
    area = "`ImageFeatures`"
    layers = st.one_of(oddities, st.integers(), st.dictionaries(st.text(max_size=3), oddities, min_size=1, max_size=1))
    wrong = {
        "keys": layers | shapes.map(lambda shape: {"a.attn1": torch.zeros(shape)}),
        "values": layers | st.just({"a.attn1": torch.zeros(3, 1, 5, 4, dtype=torch.int8)}),
        "timesteps": wrong_tensors(3).filter(lambda drawn: getattr(drawn, "dtype", None) != torch.int64),
        "feature_source": choices,
        "image_size": wrong_integers(1, 10**5).filter(lambda drawn: not isinstance(drawn, int) or drawn < 1),
    }
    outcomes = []
    # What an error is sure to name: a wrong number of timesteps shows in the shape of the layers.
    names = {"keys": "keys", "values": "values", "timesteps": "steps"}
    for start, (argument, strategy) in enumerate(wrong.items()):

        def attempt(value, argument=argument):
            make = functools.partial(some_features, **{argument: value})
            name = names.get(argument, f"`{argument}`")
            return refuse(area, f"`{argument}` = {describe(value)}", make, name)

        outcomes += fuzz(strategy, 10, attempt, start)
    features = some_features()
    outcomes += fuzz(
        st.one_of(not_finite, oddities, st.text(max_size=4), st.none(), shapes.map(torch.zeros).filter(_not_one)),
        15,
        lambda value: refuse(area, f"`at({describe(value)})`", lambda: features.at(value), "`timestep`"),
    )
    for dtype in (torch.int64, torch.bool, torch.uint8):
        outcomes.append(refuse(area, f"`to({dtype})`", lambda dtype=dtype: features.to(dtype), "`keys`"))
    return outcomes


def _not_one(tensor: torch.Tensor) -> bool:
    return tensor.numel() != 1


def try_feature_files(folder: Path) -> list[Outcome]:
    """Feature files that are damaged, of another kind, or in impossible places."""
    area, path = "feature file", folder / "picture.safetensors"
    some_features().save(path)
    whole = path.read_bytes()
    tensors, metadata = load_file(path), {"feature_source": "inversion", "image_size": "32"}
    outcomes = []

    def attempt(what: str, content: bytes) -> Outcome | None:
        path.write_bytes(content)
        return refuse(area, what, lambda: ImageFeatures.load(path), path.name, folder)

    cuts = st.integers(0, len(whole) - 1)
    outcomes += fuzz(cuts, 20, lambda cut: attempt(f"cut after {cut} bytes", whole[:cut]))
    outcomes += fuzz(st.binary(min_size=1), 10, lambda tail: attempt(f"followed by {tail!r:.40}", whole + tail))
    outcomes += fuzz(st.binary(), 15, lambda content: attempt(f"the bytes {content!r:.60}", content))
    header = st.integers(8, 300).map(lambda place: (place, whole[:place] + b"\xff" + whole[place + 1 :]))
    outcomes += fuzz(header, 10, lambda drawn: attempt(f"no UTF-8 at byte {drawn[0]} of the header", drawn[1]))
    outcomes.append(attempt("a pickle", pickle.dumps({"a": 1})))
    for name in tensors:
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest, path, metadata)
        outcomes.append(attempt(f"without {name}", path.read_bytes()))
    for key, value in (("feature_source", "noise"), ("image_size", "large"), ("image_size", "-4")):
        save_file(tensors, path, metadata | {key: value})
        outcomes.append(attempt(f"{key} {value!r} in its header", path.read_bytes()))
    for place in (folder / "none.safetensors", folder):
        outcomes.append(refuse(area, f"load {place.name}", lambda place=place: ImageFeatures.load(place), place.name))
    for place in (folder / "none" / "x.safetensors", folder, path / "x.safetensors"):
        save = functools.partial(some_features().save, place)
        outcomes.append(refuse(area, f"save as {place.relative_to(folder)}", save, place.name, folder))
    for place in (None, 5, b"x"):
        outcomes.append(refuse(area, f"save as {place!r}", functools.partial(some_features().save, place), "`path`"))
        outcomes.append(refuse(area, f"load {place!r}", functools.partial(ImageFeatures.load, place), "`path`"))
    return outcomes


# ------------------------------------------------------------------------------------------------------- checkpoints


class Trap:
    """An object that, unpickled, leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class Checkpoints:
    """Damaged copies of a good checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.good, self.bad, self.sprung = folder / "good", folder / "bad", folder / "sprung"
        MelFusionPipeline(**untrained_components()).save_pretrained(self.good)
        files = [file.relative_to(self.good) for file in sorted(self.good.rglob("*")) if file.is_file()]
        self.weights = [file for file in files if file.suffix == ".safetensors"]
        self.configs = [file for file in files if file.suffix == ".json" and file.name != "special_tokens_map.json"]
        self.folders = sorted(file.name for file in self.good.iterdir() if file.is_dir())

    def attempt(self, what: str, damage: Callable[[Path], Any], name: str, **kwargs: Any) -> Outcome | None:
        shutil.rmtree(self.bad, ignore_errors=True)
        shutil.copytree(self.good, self.bad)
        damage(self.bad)
        load = functools.partial(MelFusionPipeline.from_pretrained, self.bad, **kwargs)
        outcome = refuse("checkpoint", what, load, name, self.bad)
        assert not self.sprung.exists(), f"{what}: a pickle was executed"
        return outcome

    def change(self, file: Path, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
        return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def try_weights(folder: Path) -> list[Outcome]:
    """Weights that are cut, missing, incomplete or pickles."""
    checkpoints, outcomes = Checkpoints(folder), []
    attempt, trap = checkpoints.attempt, pickle.dumps(Trap(checkpoints.sprung))
    drawn = st.tuples(st.sampled_from(checkpoints.weights), st.floats(0, 1, exclude_max=True))
    outcomes += fuzz(
        drawn,
        24,
        lambda cut: attempt(
            f"{cut[0]} cut at {cut[1]:.2%}",
            checkpoints.change(cut[0], lambda content: content[: int(cut[1] * len(content))]),
            str(cut[0]),
        ),
    )
    for file in checkpoints.weights:
        outcomes += [
            attempt(
                f"{file} followed by more", checkpoints.change(file, lambda content: content + b"more"), str(file)
            ),
            attempt(f"{file} lacks a tensor", lambda root, file=file: drop_tensor(root / file), file.parts[0]),
            attempt(f"{file} is not there", lambda root, file=file: (root / file).unlink(), file.parts[0]),
            attempt(f"{file} is a pickle", checkpoints.change(file, lambda _: trap), str(file)),
        ]
        # Whoever asks for pickles gets torch's restricted reader: one file of each library is enough to see that.
        for flag in (True, None, False) if file.parts[0] in ("text_encoder", "unet") else (True,):
            instead = functools.partial(pickle_instead, file=file, trap=trap)
            what = f"{file.parts[0]} holds a pickle instead, use_safetensors={flag}"
            outcomes.append(attempt(what, instead, checkpoints.bad.name, use_safetensors=flag))
    return outcomes


def drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file, {"format": "pt"})


def pickle_instead(folder: Path, file: Path, trap: bytes) -> None:
    (folder / file).unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (folder / file).with_name(name).write_bytes(trap)


SWAPPED = ["unet image_unet", "vae image_vae", "text_encoder image_text_encoder", "tokenizer image_tokenizer"]
SWAPPED += ["vocoder synapse", "unet vae", "scheduler unet", "text_encoder tokenizer", "vocoder text_encoder"]


def try_checkpoints(folder: Path) -> list[Outcome]:
    """Folders that are missing or swapped, and JSON files that are cut, empty, of another kind or of another class."""
    checkpoints, outcomes = Checkpoints(folder), []
    attempt = checkpoints.attempt
    for name in checkpoints.folders:
        outcomes.append(attempt(f"no folder {name}", lambda root, name=name: shutil.rmtree(root / name), name))
    for pair in SWAPPED:
        outcomes.append(attempt(f"swapped {pair}", functools.partial(swap, *pair.split()), checkpoints.bad.name))
    cuts = st.tuples(st.sampled_from(checkpoints.configs), st.floats(0, 0.9))
    outcomes += fuzz(
        cuts,
        24,
        lambda cut: attempt(
            f"{cut[0]} cut at {cut[1]:.2%}",
            checkpoints.change(cut[0], lambda content: content[: int(cut[1] * len(content))]),
            cut[0].name,
        ),
    )
    contents = st.sampled_from([b"[]", b"{}", b"5", b'"x"', b"null", b"\xff\xfe\x00", b"[" * 10**5, b"NaN"])
    outcomes += fuzz(
        st.tuples(st.sampled_from(checkpoints.configs), contents),
        24,
        lambda drawn: attempt(
            f"{drawn[0]} holds {drawn[1]!r:.12}", checkpoints.change(drawn[0], lambda _: drawn[1]), drawn[0].name
        ),
    )
    for file in checkpoints.configs:
        outcomes.append(attempt(f"no {file}", lambda root, file=file: (root / file).unlink(), file.name))
        outcomes.append(attempt(f"nothing in {file}", checkpoints.change(file, lambda _: b"{}"), file.name))
    entries = st.one_of(
        st.integers(),
        st.text(max_size=4),
        st.lists(st.text(max_size=4), max_size=4).filter(lambda entry: len(entry) != 2),
        st.sampled_from([["diffusers", "Nonsense"], ["os", "system"], ["nonsense", "UNet2DConditionModel"]]),
        st.sampled_from([["transformers", "BertModel"], ["diffusers", 5], [None, "UNet2DConditionModel"]]),
    )
    drawn = st.tuples(st.sampled_from(checkpoints.folders), entries)
    outcomes += fuzz(
        drawn,
        20,
        lambda drawn: attempt(
            f"index: {drawn[0]} is {drawn[1]!r:.40}", functools.partial(edit_index, **dict([drawn])), "bad"
        ),
    )
    for value in (5, ["a"], "\0", "..", "/", "nowhere"):
        change = functools.partial(edit_index, _checkpoint=value)
        outcomes.append(attempt(f"index: `_checkpoint` is {value!r}", change, "model_index.json"))
    for source in (None, 5, b"x", "\0", str(folder), str(folder / "nowhere")):
        load = functools.partial(MelFusionPipeline.from_pretrained, source)
        name = source.replace("\0", "'\0'") if isinstance(source, str) else "`pretrained_model_name_or_path`"
        outcomes.append(refuse("checkpoint", f"the source {describe(source)[-30:]}", load, name))
    return outcomes


def swap(one: str, other: str, folder: Path) -> None:
    os.rename(folder / one, folder / "third")
    os.rename(folder / other, folder / one)
    os.rename(folder / "third", folder / other)


def edit_index(folder: Path, **changes: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------- triplets

json_oddities = st.one_of(st.booleans(), st.lists(st.integers(), max_size=2), st.just({}), st.just({"a": 1}))
some_texts = st.text(st.characters(categories=["Ll", "Cs", "Cc", "Po"]), max_size=6)
BAD_FIELDS = {
    "image": json_oddities | some_texts | st.none() | st.integers() | st.just("x" * 300) | st.just("a/" * 3000),
    "audio": json_oddities | some_texts | st.none() | st.integers() | st.just("x" * 300),
    "caption": json_oddities | st.none() | st.integers() | st.sampled_from(["", " ", "\t\n"]) | surrogates,
    "genre": json_oddities | st.integers() | st.sampled_from([" ", "\n"]) | surrogates,
    "start": json_oddities | not_finite | st.floats(max_value=-1e-3) | st.sampled_from(["soon", "1,5", 1e300, 60]),
    "duration": json_oddities | not_finite | st.floats(max_value=0) | st.sampled_from(["long", " ", "0"]),
}


def write_good_files(folder: Path) -> dict:
    """A picture and a second of music, and the record that joins them."""
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "0.png")
    soundfile.write(folder / "0.wav", rng.uniform(-0.5, 0.5, 16000), 16000)
    return {"image": "0.png", "audio": "0.wav", "caption": "a tune"}


def read_all(path: Path, **kwargs: Any) -> list[dict]:
    rows = load_rows(path, **kwargs)
    prepare = functools.partial(prepare_image, image_size=16)
    return [read_triplet(row, path.parent, prepare, audio_length_in_s=0.5) for row in rows]


def try_triplets(folder: Path) -> list[Outcome]:
    """Sets of triplets with wrong fields, lines, encodings and columns."""
    record, outcomes = write_good_files(folder), []
    assert len(read_all(write(folder / "set.jsonl", json.dumps(record)))) == 1
    for start, (column, strategy) in enumerate(BAD_FIELDS.items()):

        def attempt(value, column=column):
            path = write(folder / "set.jsonl", json.dumps(record | {column: value}))
            return refuse("triplet", f"`{column}` = {describe(value)}", lambda: read_all(path), "Row 0: ", folder)

        outcomes += fuzz(strategy, 14, attempt, start)
    for suffix in (".jsonl", ".json", ".csv"):

        def attempt(content, suffix=suffix):
            path = write(folder / f"set{suffix}", content)
            what = f"a {suffix} of {content[:30]!r:.40} ({len(content)} bytes)"
            # A line is refused by its row, a whole file by its name.
            outcome = refuse("triplet file", what, lambda: read_all(path), "", folder)
            assert "Row 0: " in outcome.message or path.name in outcome.message
            return outcome

        outcomes += fuzz(st.binary(), 12, attempt)
        whole = [
            b"",
            b"\n\n",
            b"[" * 10**5,
            b'[{"image": ',
            b"[1, 2]",
            b"\x00",
            b"\xff\xfe",
            b'{"image": 1' + b"0" * 5000,
        ]
        whole += [b"image,audio,caption\n", b"image,audio,caption\n\xff,b,c", b'a,b\n"' + b"x" * 200_000]
        outcomes += [attempt(content) for content in whole]
    path = write(folder / "set.jsonl", json.dumps(record))
    for columns in (
        ["image"],
        {"picture": "a"},
        {"image": None},
        {"image": ["a"]},
        {1: "a"},
        "image",
        {"image": "\ud800"},
    ):
        read = functools.partial(read_all, path, columns=columns)
        outcomes.append(refuse("triplet file", f"`columns` = {ascii(columns)}", read, "`columns`"))
    for place in (None, 5, folder, folder / "none.jsonl", folder / "0.png", ""):
        what = f"`path` = {place.name if isinstance(place, Path) else repr(place)}"
        outcomes.append(refuse("triplet file", what, functools.partial(load_rows, place), "`path`"))
    write(folder / "caps.csv", "id,text\n1,a\n")
    convert = functools.partial(convert_musiccaps, folder / "caps.csv", folder, folder, folder / "out.jsonl")
    outcomes.append(refuse("triplet file", "MusicCaps without its columns", convert, "caps.csv", folder))
    return outcomes


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def damages(whole: bytes) -> st.SearchStrategy:
    """Files that are cut, or changed in some places."""
    cuts = st.integers(0, len(whole) - 1).map(lambda cut: (f"cut after {cut} of {len(whole)} bytes", whole[:cut]))
    places = st.dictionaries(st.integers(0, min(len(whole), 400) - 1), st.integers(0, 255), min_size=1, max_size=8)

    def overwrite(changes: dict[int, int]) -> tuple[str, bytes]:
        content = bytearray(whole)
        for place, byte in changes.items():
            content[place] = byte
        return f"bytes {sorted(changes)} overwritten", bytes(content)

    return cuts | places.map(overwrite)


def try_media(folder: Path) -> list[Outcome]:
    """Pictures and sound files, cut or changed in places; what can still be decoded is no error."""
    outcomes, rng = [], np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    for suffix in (".png", ".jpg", ".gif", ".tif", ".webp", ".bmp"):
        path = folder / f"picture{suffix}"
        picture.save(path, **({} if suffix in (".gif", ".bmp") else {"exif": exif}))

        def attempt(damage, path=path):
            path.write_bytes(damage[1])
            prepare = lambda: prepare_image(open_image(path), 16)  # noqa: E731
            return refuse(
                "picture", f"{path.name} {damage[0]}", prepare, path.name, folder, torch.Tensor.is_floating_point
            )

        outcomes += fuzz(damages(path.read_bytes()), 40, attempt)
    for suffix in (".wav", ".flac", ".ogg", ".mp3"):
        path = folder / f"music{suffix}"
        soundfile.write(path, rng.uniform(-0.5, 0.5, 4000), 16000)

        def attempt(damage, path=path):
            path.write_bytes(damage[1])
            good = lambda loaded: bool(loaded[0].isfinite().all())  # noqa: E731
            return refuse("sound file", f"{path.name} {damage[0]}", lambda: load_audio(path), path.name, folder, good)

        outcomes += fuzz(damages(path.read_bytes()), 40, attempt)
    samples = np.zeros(100)
    for place in ("x.m4a", "x", "none/x.wav", ".wav"):
        what, save = f"save as {place}", functools.partial(save_audio, folder / place, samples, 16000)
        outcomes.append(refuse("sound file", what, save, place.rpartition("/")[2], folder))
    for rate in (0, -1, 1.5, True, None, "16000"):
        save = functools.partial(save_audio, folder / "x.wav", samples, rate)
        outcomes.append(refuse("sound file", f"a rate of {rate!r}", save, "`sampling_rate`", folder))
    for waveform in (
        None,
        [0.0],
        samples.astype(int),
        np.zeros(0),
        np.zeros((9, 3)),
        samples + math.nan,
        np.zeros(()),
    ):
        save = functools.partial(save_audio, folder / "x.wav", waveform, 16000)
        outcomes.append(refuse("sound file", f"the waveform {describe(waveform)}", save, "`waveform`", folder))
    return outcomes


# ------------------------------------------------------------------------------------------------------- functions

NO_REALS = ["3", True, math.nan, math.inf, [1.0], 1j, HUGE, np.zeros(2), b"x"]
NO_SECONDS = [*NO_REALS, -1.0]
NO_LENGTHS = [*NO_SECONDS, 0]
NO_COUNTS = ["3", True, math.nan, 1.5, -1, 0, [1], np.zeros(2)]
NO_SEEDS = ["3", None, math.nan, 1.5, -1, [1]]
NO_SHARES = [*NO_SECONDS, 1.5]
NO_STARTS = ["3", None, 3, [None], ["a"], [math.nan], [math.inf], np.zeros((2, 2))]
NO_PATHS = [None, 3, 1.5, [], b"x"]


def list_functions(folder: Path) -> list[tuple[Callable, dict, dict]]:
    """Public functions, arguments that are right, and for some of them what they must not be."""
    row = write_good_files(folder)
    row = {name: None for name in ("start", "duration", "genre", "split", "problem")} | row | {"row": 0}
    row |= {name: str(folder / row[name]) for name in ("image", "audio")}
    write_film(folder / "film.mp4")
    write(folder / "shots.csv", "start\n0\n1\n")
    shots, scored, times = folder / "shots.csv", film.read_film(folder / "film.mp4"), np.array([0.5])
    audio, tone, picture = folder / "0.wav", GIVEN.numpy(), PIL.Image.new("RGB", (8, 8), "red")
    pipe, embeddings = strict_pipeline(), np.random.default_rng(0).normal(size=(9, 3))
    stretch = {"path": NO_PATHS, "start": NO_SECONDS, "duration": NO_LENGTHS}
    crop = {"path": audio, "start": 0, "duration": None, "audio_length_in_s": 1, "generator": ONE_GENERATOR}
    triplet = {"row": row, "data_root": folder, "prepare_image": None, "audio_length_in_s": 0.5}
    rates, pieces = {"sampling_rate": NO_COUNTS}, {"starts": [0.0, 1.0], "duration": 2.0}
    sound = {"waveform": tone, "sampling_rate": 16000}
    mel, drawn = torch.zeros(4, 8), {"pictures": [picture], "image_start_in_s": [0.0], "audio_length_in_s": 1.0}
    story = {
        "image_start_in_s": NO_STARTS,
        "audio_length_in_s": NO_LENGTHS,
        "onsets": NO_STARTS,
        "cuts": NO_STARTS[2:],
    }
    waves = {"waveforms": torch.zeros(1, 5120)}
    tensors = [None, 3, np.zeros((1, 4, 8, 2)), torch.zeros(3), torch.zeros(1, 4, 8, 2, dtype=torch.int64)]
    chances = {"text_dropout": NO_SHARES, "image_dropout": NO_SHARES, "snr_gamma": NO_SECONDS, "logit_mean": NO_REALS}
    cache = {"folder": folder / "cache", "pipe": pipe, "num_inversion_steps": 2, "image_size": 32}
    show = {"path": folder / "show.mp4", "pictures": [picture], "starts": [0.0], **sound, "size": (32, 32)}
    sizes = [None, 3, "x", (32,), (32.0, 32.0), ("32", "32"), (32, 32, 32), (-2, -2), (33, 32), (10**9, 10**9)]
    texts = [3, [], [3]]
    return [
        (load_audio, {"path": audio}, stretch),
        (audio_duration, {}, {"path": NO_PATHS}),
        (load_random_crop, crop, stretch | {"audio_length_in_s": NO_LENGTHS, "new_sampling_rate": NO_COUNTS}),
        (save_audio, {"path": folder / "x.wav", **sound}, {"path": NO_PATHS, "sampling_rate": [HUGE]}),
        (waveform_to_latents, {**sound, "vae": pipe.vae}, {"audio_length_in_s": NO_LENGTHS} | rates),
        (encode_mel, {"vae": pipe.vae, "num_mel_bands": 8}, {"mel": [None, 3, np.zeros((1, 4, 8))]}),
        (resample, {"waveform": torch.zeros(9), "sampling_rate": 16000}, rates | {"new_sampling_rate": NO_COUNTS}),
        (Spectrogram, {}, {"min_frequency": NO_REALS, "max_frequency": NO_REALS, "sampling_rate": [*NO_COUNTS, HUGE]}),
        (check_rows, {"rows": [row], "data_root": folder}, {"min_duration_in_s": NO_SECONDS, "data_root": NO_PATHS}),
        (read_triplet, triplet, {"seed": NO_SEEDS, "epoch": NO_SEEDS, "audio_length_in_s": NO_LENGTHS} | rates),
        (TripletStream, {"rows": None, "read": None}, {"batch_size": NO_COUNTS}),
        (film.read_film, {}, {"path": NO_PATHS}),
        (film.find_shots, {}, {"film": ["film.mp4", None]}),
        (film.choose_frame, {"film": scored, "start": 0, "end": 1}, {"start": [*NO_REALS, 2], "end": [*NO_REALS, 0]}),
        (film.read_shots, {"path": shots, "duration": 4.0}, {"path": NO_PATHS, "duration": NO_SECONDS}),
        (film.split_shots, pieces | {"longest": 1.0}, {"starts": [*NO_STARTS, [1, 0]], "longest": NO_LENGTHS}),
        (film.split_shots, pieces | {"longest": 1.0}, {"duration": NO_REALS}),
        (onsets.find_onsets, sound, rates),
        (onsets.draw_spectrogram, sound, rates | {"num_columns": NO_COUNTS, "waveform": [None, np.zeros((2, 9))]}),
        (
            onsets.move_to_onsets,
            pieces | {"onsets": times, "strengths": times},
            {"starts": NO_STARTS, "duration": NO_REALS, "onsets": NO_STARTS, "strengths": [*NO_STARTS, []]}
            | {"reach": NO_SECONDS},
        ),
        (onsets.share_met, {"cuts": times, "onsets": times}, {"cuts": NO_STARTS, "tolerance": NO_SECONDS}),
        (
            onsets.share_met_by_chance,
            {"cuts": times, "variations": [times], "duration": 1.0, "generator": np.random.default_rng(0)},
            {"cuts": NO_STARTS, "duration": NO_LENGTHS, "num_shifts": NO_COUNTS, "generator": [None, 3]},
        ),
        (scoring.read_picture, {"path": row["image"]}, {"path": NO_PATHS, "side": NO_COUNTS}),
        (
            scoring.write_slideshow,
            show,
            {"size": sizes, "fade_in_s": NO_SECONDS, "starts": NO_STARTS, "pictures": [[]]},
        ),
        (scoring.check_container, {"path": folder / "x.mp4", "film": scored}, {"path": NO_PATHS, "film": ["x", None]}),
        (
            scoring.write_scored_film,
            {"path": folder / "x.mp4", "film": scored, **sound},
            {"path": NO_PATHS, "film": ["x", None], "old_sound_gain_in_db": [*NO_REALS, 100]},
        ),
        (plotting.plot_mel_spectrogram, {"mel_spectrogram": mel}, {"seconds_per_frame": NO_LENGTHS}),
        (plotting.plot_mel_spectrogram, {}, {"mel_spectrogram": [None, mel.numpy(), mel[:0], mel[0]]}),
        (plotting.plot_storyboard, drawn | {"mel_spectrogram": mel}, story),
        (
            plotting.plot_picture_influence,
            {"influence": {"a": torch.rand(4, 2, 2)}, "image": picture, "audio_length_in_s": 1.0},
            {"audio_length_in_s": NO_LENGTHS, "num_spans": NO_COUNTS, "influence": [{}]},
        ),
        (
            metrics.frechet_distance_infinity,
            {"embeddings": embeddings, "reference": embeddings},
            {"steps": [*NO_COUNTS, 1], "draws": NO_COUNTS, "seed": NO_SEEDS, "embeddings": ["x", embeddings * 1j]},
        ),
        (
            metrics.bootstrap_interval,
            {"values": embeddings[:, 0]},
            {"confidence": [*NO_SHARES, 0, 1], "resamples": NO_COUNTS, "seed": NO_SEEDS},
        ),
        (prepare_image, {"image": picture}, {"image_size": [*NO_COUNTS, None, HUGE]}),
        (prepare_image, {"image_size": 8}, {"image": [None, "x", np.zeros((4, 4))]}),
        (pipe.encode_prompt, {}, {"prompt": [None, *texts]}),
        (pipe.encode_prompt, {"prompt": "a"}, {"negative_prompt": [*texts, ["a", "b"]]}),
        (pipe.encode_prompt, {}, {"prompt_embeds": ["x", torch.zeros(2)]}),
        (pipe.encode_image_prompt, {}, {"image_prompt": [None, *texts, ["a", "b"]], "num_images": NO_COUNTS}),
        (pipe.prepare_image_latents, {"image": picture}, {"image_size": [*NO_COUNTS, HUGE]}),
        (pipe.encode_audio, waves, {"window_length_in_s": NO_SECONDS, "waveforms": tensors}),
        (pipe.decode_latents, {"latents": torch.zeros(1, 4, 8, 2)}, {"window_length_in_s": NO_SECONDS}),
        (pipe.decode_latents, {}, {"latents": tensors}),
        (
            pipe.mel_spectrogram_to_waveform,
            {"mel_spectrogram": torch.zeros(1, 32, 8)},
            {"mel_spectrogram": tensors[:4], "audio_length_in_s": NO_SECONDS},
        ),
        (MelFusionObjective, {"pipe": pipe}, chances | {"seed": NO_SEEDS}),
        (TrajectoryCache, cache, {"folder": NO_PATHS, "num_inversion_steps": [*NO_COUNTS, 1001]}),
        (TrajectoryCache, cache, {"image_size": [*NO_COUNTS, 30]}),
        (add_lora, {"unet": pipe.unet}, {"rank": NO_COUNTS, "lora_alpha": NO_LENGTHS, "seed": NO_SEEDS}),
        (add_lora, {"unet": pipe.unet}, {"targets": [None, 3, "to_q", [], ["none"]]}),
    ]


def try_functions(folder: Path) -> list[Outcome]:
    """Functions beside the pipeline's call, each with one argument of a wrong type or out of range."""
    outcomes = []
    for function, right, wrong in list_functions(folder):
        for argument, values in wrong.items():
            for value in values:
                call = functools.partial(function, **{**right, argument: value})
                what = f"`{function.__name__}({argument}={describe(value)})`"
                outcomes.append(refuse("function", what, call, f"`{argument}`"))
    return outcomes


# The areas, and how many distinct bad inputs each tries at least.
AREAS = {
    try_arguments: 150,
    try_features: 40,
    try_feature_files: 60,
    try_weights: 60,
    try_checkpoints: 100,
    try_triplets: 90,
    try_media: 100,
    try_functions: 500,
}


def try_area(area: Callable[[Path], list[Outcome]]) -> list[Outcome]:
    """Tries everything of an area in a folder of its own; each distinct input once."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [
            outcome._replace(message=outcome.message.replace(f"{folder}/", "")) for outcome in area(Path(folder))
        ]
    return list({(outcome.area, outcome.what): outcome for outcome in outcomes}.values())


def format_table(outcomes: list[Outcome]) -> str:
    lines = ["| area | bad input | error | message |", "|---|---|---|---|"]
    for outcome in outcomes:
        cells = [ascii(cell)[1:-1].replace("|", "\\|") for cell in outcome]
        lines.append(f"| {' | '.join([*cells[:3], cells[3][:120]])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    everything = [outcome for area in AREAS for outcome in try_area(area)]
    print(format_table(everything))
    print(f"\n{len(everything)} distinct bad inputs, each refused with a named cause.")
